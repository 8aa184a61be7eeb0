# Listen at the machine's serial pipe for some seconds. The machine's process is the pipe's server and makes it at start.
Invoke-Operation {
    $asked = Read-Parameters
    $path = Get-Pipe ([string]$asked.id)
    if ($path -notmatch '^\\\\\.\\pipe\\([^\\]+)$') { Stop-Operation 'not-found' 'the machine has no serial pipe' }
    $name = $matches[1]
    Add-Type -AssemblyName 'System.Core'
    $direction = [System.IO.Pipes.PipeDirection]::InOut
    $options = [System.IO.Pipes.PipeOptions]::Asynchronous
    $pipe = New-Object -TypeName 'System.IO.Pipes.NamedPipeClientStream' -ArgumentList @('.', $name, $direction, $options)
    $heard = New-Object -TypeName 'System.IO.MemoryStream'
    $end = [DateTime]::UtcNow.AddSeconds([int]$asked.seconds)
    try {
        try {
            $pipe.Connect(2000)
        } catch [System.TimeoutException] {
            # Nobody serves it yet, or somebody else listens: nothing was heard.
            @{ 'data' = '' }
            return
        }
        $buffer = New-Object -TypeName 'System.Byte[]' -ArgumentList 65536
        while (([DateTime]::UtcNow -lt $end) -and ($heard.Length -lt 1048576)) {
            $pending = $pipe.BeginRead($buffer, 0, $buffer.Length, $null, $null)
            $left = [int][Math]::Max(1, ($end - [DateTime]::UtcNow).TotalMilliseconds)
            if (-not $pending.AsyncWaitHandle.WaitOne($left, $false)) { break }
            $count = $pipe.EndRead($pending)
            if ($count -le 0) { break }
            $heard.Write($buffer, 0, $count)
        }
    } finally {
        $pipe.Dispose()
    }
    @{ 'data' = [System.Convert]::ToBase64String($heard.ToArray()) }
}
