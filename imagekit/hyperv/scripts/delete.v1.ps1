# Switch off and remove the machine, no file. One whose notes changed since is not ours any more.
Invoke-Operation {
    $asked = Read-Parameters
    $computer = Find-Machine ([string]$asked.id)
    if ($null -eq $computer) {
        @{ 'deleted' = $false }
        return
    }
    $settings = Get-Settings $computer
    $own = Get-Ownership ([string]$settings.Notes)
    if ($own['uuid'] -ne ([string]$asked.uuid).ToLowerInvariant()) { Stop-Operation 'mismatch' 'the notes of the machine changed' }
    if ((Get-StateName $computer) -ne 'Off') { Set-State $computer 3 100 }
    $ports = @(Get-PortPaths $settings)
    [void](Invoke-Wmi (Get-ManagementService) 'DestroyVirtualSystem' @{ 'ComputerSystem' = [string]$computer.__PATH })
    Remove-Ports $ports
    @{ 'deleted' = $true }
}
