# Remove one file; one that is in use stays and is an error.
Invoke-Operation {
    $asked = Read-Parameters
    $path = [string]$asked.path
    $there = [System.IO.File]::Exists($path)
    if ($there) { [System.IO.File]::Delete($path) }
    @{ 'removed' = $there }
}
