# Switch off and remove the machine, no file. One whose notes changed since is not ours any more.
Invoke-Operation {
    $asked = Read-Parameters
    $id = [string]$asked.id
    $vm = Find-Machine $id
    if ($null -eq $vm) {
        @{ 'deleted' = $false }
        return
    }
    $own = Get-Ownership ([string]$vm.Notes)
    if ($own['uuid'] -ne ([string]$asked.uuid).ToLowerInvariant()) { Stop-Operation 'mismatch' 'the notes of the machine changed' }
    if ([string]$vm.State -ne 'Off') { Hyper-V\Stop-VM -VM $vm -TurnOff -Force }
    foreach ($checkpoint in @(Hyper-V\Get-VMSnapshot -VM $vm)) { Hyper-V\Remove-VMSnapshot -VMSnapshot $checkpoint }
    # Checkpoints are merged into their disk first; a machine removed meanwhile would leave half of it.
    $end = [DateTime]::UtcNow.AddSeconds(100)
    while ([string](Get-Machine $id).SecondaryOperationalStatus -match 'Merging') {
        if ([DateTime]::UtcNow -gt $end) { Stop-Operation 'timeout' 'disks are still being merged' }
        Start-Sleep -Seconds 1
    }
    Hyper-V\Remove-VM -VM (Get-Machine $id) -Force
    @{ 'deleted' = $true }
}
