# Take the medium out of every DVD drive.
Invoke-Operation {
    $asked = Read-Parameters
    $computer = Get-Machine ([string]$asked.id)
    foreach ($medium in @(Get-Resources (Get-Settings $computer) 'Msvm_ResourceAllocationSettingData' 'Microsoft Virtual CD/DVD Disk')) {
        Remove-Resource $computer $medium
    }
    @{}
}
