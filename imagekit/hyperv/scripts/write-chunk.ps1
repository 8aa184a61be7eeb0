# Append to a new file at exactly this offset; the first piece makes the file.
Invoke-Operation {
    $asked = Read-Parameters
    $path = [string]$asked.path
    $offset = [long]$asked.offset
    $data = [System.Convert]::FromBase64String([string]$asked.data)
    $mode = [System.IO.FileMode]::Open
    if ($offset -eq 0) { $mode = [System.IO.FileMode]::CreateNew }
    $stream = [System.IO.File]::Open($path, $mode, [System.IO.FileAccess]::Write, [System.IO.FileShare]::None)
    try {
        if ($stream.Length -ne $offset) {
            Stop-Operation 'mismatch' ($path + ' has ' + $stream.Length + ' bytes, not ' + $offset)
        }
        [void]$stream.Seek($offset, [System.IO.SeekOrigin]::Begin)
        $stream.Write($data, 0, $data.Length)
        $stream.Flush()
        $size = [long]$stream.Length
    } finally {
        $stream.Close()
    }
    @{ 'size' = $size }
}
