# Say in the notes that the machine is complete.
Invoke-Operation {
    $asked = Read-Parameters
    $computer = Get-Machine ([string]$asked.id)
    $settings = Get-Settings $computer
    $own = Get-Ownership ([string]$settings.Notes)
    if (-not $own['uuid']) { Stop-Operation 'mismatch' 'the notes of the machine changed' }
    Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'Notes' = [string](Get-NotesText $own['uuid'] ([string]$asked.spec) 'ready') }
    Update-System $computer $settings
    @{}
}
