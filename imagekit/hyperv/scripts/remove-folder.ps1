# Remove a folder that holds no file, with the empty folders that Hyper-V made in it. A link counts as a file.
function Test-Empty([string]$Folder) {
    if (@([System.IO.Directory]::GetFiles($Folder)).Count -gt 0) { return $false }
    foreach ($below in @([System.IO.Directory]::GetDirectories($Folder))) {
        if ([System.IO.File]::GetAttributes($below) -band [System.IO.FileAttributes]'ReparsePoint') { return $false }
        if (-not (Test-Empty $below)) { return $false }
    }
    return $true
}

# Deletes each folder only as an empty one: a file that came meanwhile stops it.
function Remove-Empty([string]$Folder) {
    foreach ($below in @([System.IO.Directory]::GetDirectories($Folder))) { Remove-Empty $below }
    [System.IO.Directory]::Delete($Folder, $false)
}

Invoke-Operation {
    $asked = Read-Parameters
    $path = [string]$asked.path
    $removed = $false
    if ([System.IO.Directory]::Exists($path)) {
        $link = [System.IO.File]::GetAttributes($path) -band [System.IO.FileAttributes]'ReparsePoint'
        if (-not $link -and (Test-Empty $path)) {
            Remove-Empty $path
            $removed = $true
        }
    }
    @{ 'removed' = $removed }
}
