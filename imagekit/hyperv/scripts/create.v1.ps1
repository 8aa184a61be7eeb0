# Make the machine unless its name or uuid is taken, and write its notes at once; what fails is undone here.
Invoke-Operation {
    $asked = Read-Parameters
    $uuid = ([string]$asked.uuid).ToLowerInvariant()
    $name = [string]$asked.name
    $folder = [string]$asked.folder
    $megabytes = [uint64]([long]$asked.memory / 1048576)
    if ([int]$asked.generation -ne 1) { Stop-Operation 'unsupported' 'this host knows generation 1 only' }
    if (-not [System.IO.Directory]::Exists($folder)) { Stop-Operation 'not-found' ('there is no folder ' + $folder) }
    $service = Get-ManagementService
    $lock = Enter-Creation
    try {
        foreach ($other in @(Get-Machines)) {
            if ([string]$other.ElementName -eq $name) { Stop-Operation 'exists' ('a machine is named ' + $name + ' already') }
            if ((Get-Ownership ([string](Get-Settings $other).Notes))['first'] -eq $uuid) { Stop-Operation 'exists' ('a machine has the uuid ' + $uuid + ' already') }
        }
        $shared = ([wmiclass]($Namespace + ':Msvm_VirtualSystemGlobalSettingData')).CreateInstance()
        Set-Properties $shared 'Msvm_VirtualSystemGlobalSettingData' @{
            'ElementName' = [string]$name
            'ExternalDataRoot' = [string]$folder
            'SnapshotDataRoot' = [string]$folder
            'AutomaticStartupAction' = [uint16]0
            'AutomaticShutdownAction' = [uint16]2
        }
        $out = Invoke-Wmi $service 'DefineVirtualSystem' @{ 'SystemSettingData' = [string]$shared.GetText(1); 'ResourceSettingData' = $null; 'SourceSetting' = $null }
        $computer = [wmi][string]$out.GetPropertyValue('DefinedSystem')
        try {
            $settings = Get-Settings $computer
            Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'Notes' = [string](Get-NotesText $uuid ([string]$asked.spec) 'building') }
            Update-System $computer $settings
            $memory = @(Get-Resources $settings 'Msvm_MemorySettingData' '')[0]
            Set-Properties $memory 'Msvm_MemorySettingData' @{ 'VirtualQuantity' = [uint64]$megabytes; 'Reservation' = [uint64]$megabytes; 'Limit' = [uint64]$megabytes }
            Update-Resource $computer $memory
            $processor = @(Get-Resources $settings 'Msvm_ProcessorSettingData' '')[0]
            Set-Properties $processor 'Msvm_ProcessorSettingData' @{ 'VirtualQuantity' = [uint64]$asked.cpus; 'Reservation' = [uint64]$asked.cpus; 'Limit' = [uint64]100000 }
            Update-Resource $computer $processor
        } catch {
            [void](Invoke-Wmi $service 'DestroyVirtualSystem' @{ 'ComputerSystem' = [string]$computer.__PATH })
            throw
        }
    } finally {
        $lock.ReleaseMutex()
        $lock.Close()
    }
    @{ 'id' = [string]$computer.Name }
}
