# Whether the host can take the machine: folder, space, memory, switches. Changes nothing that stays.
Invoke-Operation {
    $asked = Read-Parameters
    $problems = @()
    $store = [string]$asked.store
    if (-not [System.IO.Directory]::Exists($store)) {
        $problems += @{ 'kind' = 'not-found'; 'message' = 'there is no folder ' + $store }
    } else {
        $problems += @(Test-Store $store $Nonce)
        $free = Get-FreeBytes $store
        if (($null -ne $free) -and ($free -lt [uint64]$asked.bytes)) {
            $problems += @{ 'kind' = 'space'; 'message' = $store + ' has ' + $free + ' bytes left, ' + $asked.bytes + ' are needed' }
        }
    }
    $memory = [uint64](Get-WmiObject -Class 'Win32_OperatingSystem').FreePhysicalMemory * 1024
    if ($memory -lt [uint64]$asked.memory) {
        $problems += @{ 'kind' = 'memory'; 'message' = 'the host has ' + $memory + ' bytes of memory left, ' + $asked.memory + ' are needed' }
    }
    $there = @(Get-SwitchNames)
    foreach ($name in @(Get-AskedSwitches $asked)) {
        $count = @($there | Where-Object { $_ -ceq $name }).Count
        if ($count -eq 0) { $problems += @{ 'kind' = 'not-found'; 'message' = 'there is no switch named ' + $name } }
        if ($count -gt 1) { $problems += @{ 'kind' = 'invalid'; 'message' = $count.ToString() + ' switches are named ' + $name } }
    }
    @{ 'problems' = @($problems) }
}
