# Ask the guest to shut down, or switch off; a machine that is off is fine.
Invoke-Operation {
    $asked = Read-Parameters
    $vm = Get-Machine ([string]$asked.id)
    if ([string]$vm.State -ne 'Off') {
        if ($asked.force) {
            Hyper-V\Stop-VM -VM $vm -TurnOff -Force
        } else {
            # Force: no question is asked about a guest that is locked or has unsaved data.
            Hyper-V\Stop-VM -VM $vm -Force
        }
        $state = [string](Get-Machine ([string]$asked.id)).State
        if ($state -ne 'Off') { Stop-Operation 'timeout' ('the machine did not shut down, it is ' + $state) }
    }
    @{}
}
