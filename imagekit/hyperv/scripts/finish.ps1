# Say in the notes that the machine is complete.
Invoke-Operation {
    $asked = Read-Parameters
    $vm = Get-Machine ([string]$asked.id)
    $own = Get-Ownership ([string]$vm.Notes)
    if (-not $own['uuid']) { Stop-Operation 'mismatch' 'the notes of the machine changed' }
    Hyper-V\Set-VM -VM $vm -Notes (Get-NotesText $own['uuid'] ([string]$asked.spec) 'ready')
    @{}
}
