# Ask the guest to shut down, or switch off; a machine that is off is fine.
Invoke-Operation {
    $asked = Read-Parameters
    $computer = Get-Machine ([string]$asked.id)
    if ((Get-StateName $computer) -eq 'Off') {
        @{}
        return
    }
    if ($asked.force -eq 'true') {
        Set-State $computer 3 100
        @{}
        return
    }
    $filter = "SystemName='" + (ConvertTo-Literal ([string]$computer.Name)) + "'"
    $parts = @(Get-Objects 'Msvm_ShutdownComponent' $filter)
    if ($parts.Count -eq 0) { Stop-Operation 'unsupported' 'the guest has no shutdown service: use force' }
    [void](Invoke-Wmi $parts[0] 'InitiateShutdown' @{ 'Force' = [bool]$true; 'Reason' = 'imagekit' })
    $end = [DateTime]::UtcNow.AddSeconds(150)
    while ((Get-StateName (Get-Machine ([string]$computer.Name))) -ne 'Off') {
        if ([DateTime]::UtcNow -gt $end) { Stop-Operation 'timeout' 'the machine did not shut down' }
        Start-Sleep -Seconds 1
    }
    @{}
}
