# Switch the machine on; one that runs already is fine.
Invoke-Operation {
    $asked = Read-Parameters
    $vm = Get-Machine ([string]$asked.id)
    if ([string]$vm.State -ne 'Running') { Hyper-V\Start-VM -VM $vm }
    @{}
}
