# What scripts for Windows Server 2012 and later share: PowerShell 3 and the Hyper-V module.
function Read-Parameters {
    return ConvertFrom-Json -InputObject $Parameters
}

# Whether a command is here and takes this parameter: hosts differ within one version, so they are asked.
function Test-Parameter([string]$Command, [string]$Parameter) {
    $found = Get-Command -Name $Command -ErrorAction SilentlyContinue
    return ($null -ne $found) -and $found.Parameters.ContainsKey($Parameter)
}

# A machine by its id: names are not unique, and cmdlets take them as patterns.
function Get-Machine([string]$Id) {
    $machine = Find-Machine $Id
    if ($null -eq $machine) { Stop-Operation 'not-found' ('there is no machine ' + $Id) }
    return $machine
}

function Find-Machine([string]$Id) {
    $machine = Hyper-V\Get-VM -Id ([guid]$Id) -ErrorAction SilentlyContinue
    if ($null -eq $machine) {
        # Tells "not there" from "not allowed to look".
        [void](Hyper-V\Get-VMHost)
    }
    return $machine
}

function Get-SwitchNames {
    foreach ($one in @(Hyper-V\Get-VMSwitch)) { [string]$one.Name }
}

# The settings of a machine as WMI has them: what no cmdlet sets is set there.
function Get-Settings([string]$Id) {
    $filter = "VirtualSystemIdentifier='" + ([guid]$Id).ToString().ToUpperInvariant() + "' AND VirtualSystemType='Microsoft:Hyper-V:System:Realized'"
    $settings = @(Get-WmiObject -Namespace 'root\virtualization\v2' -Class 'Msvm_VirtualSystemSettingData' -Filter $filter)
    if ($settings.Count -ne 1) { Stop-Operation 'not-found' ('the settings of the machine ' + $Id + ' were not found') }
    return $settings[0]
}

function Get-ManagementService {
    return @(Get-WmiObject -Namespace 'root\virtualization\v2' -Class 'Msvm_VirtualSystemManagementService')[0]
}

# Whether Hyper-V itself takes a disk.
function Test-Disk([string]$Path) {
    return [bool](Hyper-V\Test-VHD -Path $Path)
}

function Get-Pipe([string]$Id) {
    return [string](Get-Machine $Id).ComPort1.Path
}

function Get-AskedSwitches($Asked) {
    foreach ($name in @($Asked.switches)) { [string]$name }
}
