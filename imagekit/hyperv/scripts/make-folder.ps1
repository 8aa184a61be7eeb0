# Make a folder and say whether it was there. Made under another name and moved: who comes second sees that it is.
Invoke-Operation {
    $asked = Read-Parameters
    $path = [string]$asked.path
    if ([System.IO.File]::Exists($path)) { Stop-Operation 'exists' ($path + ' is a file') }
    if ([System.IO.Directory]::Exists($path)) {
        @{ 'created' = $false }
        return
    }
    $parent = [System.IO.Path]::GetDirectoryName($path)
    if (-not [System.IO.Directory]::Exists($parent)) { Stop-Operation 'not-found' ('there is no folder ' + $parent) }
    $made = $path + '.' + $Nonce
    [void][System.IO.Directory]::CreateDirectory($made)
    $created = $true
    try {
        [System.IO.Directory]::Move($made, $path)
    } catch {
        [System.IO.Directory]::Delete($made, $false)
        if (-not [System.IO.Directory]::Exists($path)) { throw }
        $created = $false
    }
    @{ 'created' = $created }
}
