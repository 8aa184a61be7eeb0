# Whether a file is there, its size, and its SHA-256 where asked for and the size is the one expected.
Invoke-Operation {
    $asked = Read-Parameters
    $file = New-Object -TypeName 'System.IO.FileInfo' -ArgumentList ([string]$asked.path)
    if (-not $file.Exists) {
        @{ 'exists' = $false }
        return
    }
    $answer = @{ 'exists' = $true; 'size' = [long]$file.Length }
    if (($asked.hash -eq 'true') -and ($file.Length -eq [long]$asked.size)) {
        $answer['sha256'] = Get-Sha256 $file.FullName
    }
    $answer
}
