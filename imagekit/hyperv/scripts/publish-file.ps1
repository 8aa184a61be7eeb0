# Check a file that arrived, make it fit for Hyper-V, give it its name; a file of that name is never replaced.
Invoke-Operation {
    $asked = Read-Parameters
    $part = [string]$asked.part
    $path = [string]$asked.path
    $file = New-Object -TypeName 'System.IO.FileInfo' -ArgumentList $part
    if (-not $file.Exists) { Stop-Operation 'not-found' ('there is no file ' + $part) }
    if ($file.Length -ne [long]$asked.size) {
        Stop-Operation 'mismatch' ($part + ' has ' + $file.Length + ' bytes, not ' + $asked.size)
    }
    $sha256 = Get-Sha256 $part
    if ($sha256 -ne ([string]$asked.sha256)) { Stop-Operation 'mismatch' ('the SHA-256 of ' + $part + ' is ' + $sha256) }

    # Hyper-V refuses sparse, compressed and encrypted files (0xC03A001A).
    $system = Join-Path -Path $env:SystemRoot -ChildPath 'System32'
    $bad = [System.IO.FileAttributes]'SparseFile, Compressed, Encrypted'
    if ($file.Attributes -band [System.IO.FileAttributes]'SparseFile') {
        [void](& (Join-Path -Path $system -ChildPath 'fsutil.exe') 'sparse' 'setflag' $part '0')
    }
    if ($file.Attributes -band [System.IO.FileAttributes]'Compressed') {
        [void](& (Join-Path -Path $system -ChildPath 'compact.exe') '/U' '/Q' $part)
    }
    if ($file.Attributes -band [System.IO.FileAttributes]'Encrypted') { [System.IO.File]::Decrypt($part) }
    $file.Refresh()
    $left = $file.Attributes -band $bad
    if ($left) { Stop-Operation 'sparse' ($part + ' stays ' + $left + ': use another folder or volume') }

    if ([System.IO.File]::Exists($path)) { Stop-Operation 'exists' ($path + ' is there already') }
    [System.IO.File]::Move($part, $path)
    if ($path -match '\.vhdx?$') {
        # Hyper-V goes by the extension, so it is asked under the final name; what it refuses goes back.
        $good = $false
        try {
            $good = Test-Disk $path
        } finally {
            if (-not $good) { [System.IO.File]::Move($path, $part) }
        }
        if (-not $good) { Stop-Operation 'invalid' ('Hyper-V does not take ' + $path) }
    }
    @{}
}
