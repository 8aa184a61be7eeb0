# What scripts for Windows Server 2008 R2 share: PowerShell 2.0, and WMI's first namespace of Hyper-V.
# Parsed and checked against recorded facts, never run: a host takes them once its self-test has passed.
$Namespace = 'root\virtualization'

# Parameters come as lines of key=base64; what lay deeper has its place in the key: nics.0.mac.
function Read-Parameters {
    $values = @{}
    foreach ($line in $Parameters.Split([char]10)) {
        $at = $line.IndexOf('=')
        if ($at -gt 0) {
            $packed = $line.Substring($at + 1).Trim()
            $values[$line.Substring(0, $at)] = [System.Text.Encoding]::UTF8.GetString([System.Convert]::FromBase64String($packed))
        }
    }
    return $values
}

function Get-Count($Asked, [string]$Name) {
    return [int]$Asked[$Name + '.count']
}

function Get-AskedSwitches($Asked) {
    for ($index = 0; $index -lt (Get-Count $Asked 'switches'); $index++) { [string]$Asked['switches.' + $index + '.'] }
}

# A text within a WQL query, between single quotes.
function ConvertTo-Literal([string]$Text) {
    return $Text.Replace('\', '\\').Replace("'", "\'")
}

function Get-Objects([string]$Class, [string]$Filter) {
    if ($Filter) { return Get-WmiObject -Namespace $Namespace -Class $Class -Filter $Filter }
    return Get-WmiObject -Namespace $Namespace -Class $Class
}

# A service of Hyper-V: there is one of each, and none is seen without the rights to it.
function Get-HyperVService([string]$Class) {
    $found = @(Get-Objects $Class '')
    if ($found.Count -ne 1) { Stop-Operation 'denied' ('Hyper-V shows this account no ' + $Class) }
    return $found[0]
}

function Get-ManagementService {
    return Get-HyperVService 'Msvm_VirtualSystemManagementService'
}

# The machines; the host itself is one too, the only one without settings of a machine.
function Get-Machines {
    foreach ($computer in @(Get-Objects 'Msvm_ComputerSystem' '')) {
        if ([string]$computer.Name -match '^[0-9A-Fa-f]{8}-([0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}$') { $computer }
    }
}

function Find-Machine([string]$Id) {
    $found = @(Get-Machines | Where-Object { [string]$_.Name -eq $Id })
    if ($found.Count -eq 1) { return $found[0] }
    # Tells "not there" from "not allowed to look".
    [void](Get-ManagementService)
    return $null
}

function Get-Machine([string]$Id) {
    $machine = Find-Machine $Id
    if ($null -eq $machine) { Stop-Operation 'not-found' ('there is no machine ' + $Id) }
    return $machine
}

# SettingType 3: what the machine has now, not a snapshot of it.
function Get-Settings($Computer) {
    $found = @($Computer.GetRelated('Msvm_VirtualSystemSettingData') | Where-Object { [int]$_.SettingType -eq 3 })
    if ($found.Count -ne 1) { Stop-Operation 'not-found' ('the settings of the machine ' + $Computer.Name + ' were not found') }
    return $found[0]
}

function Get-Resources($Settings, [string]$Class, [string]$SubType) {
    foreach ($resource in @($Settings.GetRelated($Class))) {
        if ((-not $SubType) -or ([string]$resource.ResourceSubType -eq $SubType)) { $resource }
    }
}

# The default of a resource, to be changed and added: built from nothing it would lack what the host expects.
function Get-Template([string]$Class, [string]$SubType) {
    $filter = "ResourceSubType='" + (ConvertTo-Literal $SubType) + "' AND InstanceID LIKE '%Default'"
    $found = @(Get-Objects $Class $filter)
    if ($found.Count -eq 0) { Stop-Operation 'unsupported' ('this host has no default of ' + $SubType) }
    return $found[0]
}

function Add-Resource($Computer, $Resource) {
    $values = @{ 'TargetSystem' = [string]$Computer.__PATH; 'ResourceSettingData' = [string[]]@($Resource.GetText(1)) }
    $out = Invoke-Wmi (Get-ManagementService) 'AddVirtualSystemResources' $values
    return [string]@($out.GetPropertyValue('NewResources'))[0]
}

function Remove-Resource($Computer, $Resource) {
    $values = @{ 'TargetSystem' = [string]$Computer.__PATH; 'ResourceSettingData' = [string[]]@($Resource.__PATH) }
    [void](Invoke-Wmi (Get-ManagementService) 'RemoveVirtualSystemResources' $values)
}

function Update-Resource($Computer, $Resource) {
    $values = @{ 'ComputerSystem' = [string]$Computer.__PATH; 'ResourceSettingData' = [string[]]@($Resource.GetText(1)) }
    [void](Invoke-Wmi (Get-ManagementService) 'ModifyVirtualSystemResources' $values)
}

function Update-System($Computer, $Settings) {
    $values = @{ 'ComputerSystem' = [string]$Computer.__PATH; 'SystemSettingData' = [string]$Settings.GetText(1) }
    [void](Invoke-Wmi (Get-ManagementService) 'ModifyVirtualSystem' $values)
}

function Get-SwitchNames {
    foreach ($one in @(Get-Objects 'Msvm_VirtualSwitch' '')) { [string]$one.ElementName }
}

# EnabledState and the words that later hosts use for it.
function Get-StateName($Computer) {
    $names = @{ 2 = 'Running'; 3 = 'Off'; 32768 = 'Paused'; 32769 = 'Saved'; 32770 = 'Starting'; 32773 = 'Saving'; 32774 = 'Stopping'; 32776 = 'Pausing'; 32777 = 'Resuming' }
    $state = [int]$Computer.EnabledState
    if ($names.ContainsKey($state)) { return $names[$state] }
    return $state.ToString()
}

# Asks for a state and waits until the machine has it. 32775: it has it already.
function Set-State($Computer, [int]$State, [int]$Seconds) {
    [void](Invoke-Wmi $Computer 'RequestStateChange' @{ 'RequestedState' = [uint16]$State } @(32775))
    $end = [DateTime]::UtcNow.AddSeconds($Seconds)
    while ([int](Get-Machine ([string]$Computer.Name)).EnabledState -ne $State) {
        if ([DateTime]::UtcNow -gt $end) { Stop-Operation 'timeout' ('the machine did not reach the state ' + $State) }
        Start-Sleep -Milliseconds 500
    }
}

# Whether Hyper-V itself takes a disk. It knows VHD only.
function Test-Disk([string]$Path) {
    [void](Invoke-Wmi (Get-HyperVService 'Msvm_ImageManagementService') 'ValidateVirtualHardDisk' @{ 'Path' = [string]$Path })
    return $true
}

function Get-Pipe([string]$Id) {
    $ports = @(Get-Resources (Get-Settings (Get-Machine $Id)) 'Msvm_ResourceAllocationSettingData' 'Microsoft Serial Port')
    if ($ports.Count -eq 0) { return '' }
    return [string]@($ports[0].Connection)[0]
}

# The ports of switches that a machine's adapters are plugged into.
function Get-PortPaths($Settings) {
    foreach ($class in @('Msvm_SyntheticEthernetPortSettingData', 'Msvm_EmulatedEthernetPortSettingData')) {
        foreach ($nic in @(Get-Resources $Settings $class '')) {
            foreach ($path in @($nic.Connection)) { if ($path) { [string]$path } }
        }
    }
}

# Removes ports; without that they stay on their switch when the machine is gone.
function Remove-Ports($Paths) {
    foreach ($path in @($Paths)) {
        [void](Invoke-Wmi (Get-HyperVService 'Msvm_VirtualSwitchManagementService') 'DeleteSwitchPort' @{ 'SwitchPort' = [string]$path } @(32775))
    }
}
