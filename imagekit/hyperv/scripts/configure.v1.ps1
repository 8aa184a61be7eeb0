# Network adapters, serial pipe, firmware tables, key-value pairs. May be repeated.
function Add-Adapter($Computer, $Asked, [string]$At) {
    $class = 'Msvm_SyntheticEthernetPortSettingData'
    $subtype = 'Microsoft Synthetic Ethernet Port'
    if ($Asked[$At + 'legacy'] -eq 'true') {
        $class = 'Msvm_EmulatedEthernetPortSettingData'
        $subtype = 'Microsoft Emulated Ethernet Port'
    }
    $nic = Get-Template $class $subtype
    Set-Properties $nic 'Msvm_SyntheticEthernetPortSettingData' @{
        'ElementName' = [string]$Asked[$At + 'name']
        'Address' = [string]$Asked[$At + 'mac']
        'StaticMacAddress' = [bool]$true
    }
    if ($class -eq 'Msvm_SyntheticEthernetPortSettingData') {
        Set-Properties $nic 'Msvm_SyntheticEthernetPortSettingData' @{ 'VirtualSystemIdentifiers' = [string[]]@('{' + [guid]::NewGuid().ToString() + '}') }
    }
    $port = ''
    if ($Asked[$At + 'switch']) {
        $port = Add-Port ([string]$Asked[$At + 'switch']) ([string]$Asked[$At + 'vlan'])
        Set-Properties $nic 'Msvm_SyntheticEthernetPortSettingData' @{ 'Connection' = [string[]]@($port) }
    }
    try {
        [void](Add-Resource $Computer $nic)
    } catch {
        if ($port) { Remove-Ports @($port) }
        throw
    }
}

# A new port of the switch with this name, with its VLAN.
function Add-Port([string]$Name, [string]$Vlan) {
    $found = @(Get-Objects 'Msvm_VirtualSwitch' '' | Where-Object { [string]$_.ElementName -ceq $Name })
    if ($found.Count -ne 1) { Stop-Operation 'not-found' ($found.Count.ToString() + ' switches are named ' + $Name) }
    $port = [guid]::NewGuid().ToString()
    $values = @{ 'VirtualSwitch' = [string]$found[0].__PATH; 'Name' = [string]$port; 'FriendlyName' = [string]$port; 'ScopeOfResidence' = '' }
    $out = Invoke-Wmi (Get-HyperVService 'Msvm_VirtualSwitchManagementService') 'CreateSwitchPort' $values
    $path = [string]$out.GetPropertyValue('CreatedSwitchPort')
    if ($Vlan) {
        try {
            $endpoint = @(([wmi]$path).GetRelated('Msvm_VLANEndpoint'))[0]
            $setting = @($endpoint.GetRelated('Msvm_VLANEndpointSettingData'))[0]
            Set-Properties $setting 'Msvm_VLANEndpointSettingData' @{ 'AccessVLAN' = [uint16]$Vlan }
            [void]$setting.Put()
        } catch {
            Remove-Ports @($path)
            throw
        }
    }
    return $path
}

Invoke-Operation {
    $asked = Read-Parameters
    $computer = Get-Machine ([string]$asked.id)
    $settings = Get-Settings $computer
    $service = Get-ManagementService

    $ports = @(Get-PortPaths $settings)
    foreach ($class in @('Msvm_SyntheticEthernetPortSettingData', 'Msvm_EmulatedEthernetPortSettingData')) {
        foreach ($nic in @(Get-Resources $settings $class '')) { Remove-Resource $computer $nic }
    }
    Remove-Ports $ports
    for ($index = 0; $index -lt (Get-Count $asked 'nics'); $index++) { Add-Adapter $computer $asked ('nics.' + $index + '.') }

    $serial = @(Get-Resources $settings 'Msvm_ResourceAllocationSettingData' 'Microsoft Serial Port')
    if ($serial.Count -eq 0) { Stop-Operation 'unsupported' 'the machine has no serial port' }
    Set-Properties $serial[0] 'Msvm_ResourceAllocationSettingData' @{ 'Connection' = [string[]]@([string]$asked.pipe) }
    try {
        Update-Resource $computer $serial[0]
    } catch {
        # The first change of a serial port of a new machine may fail, the second does not.
        Start-Sleep -Seconds 1
        Update-Resource $computer $serial[0]
    }

    $own = Get-Ownership ([string]$settings.Notes)
    Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'BIOSGUID' = [string]('{' + $own['uuid'].ToUpperInvariant() + '}') }
    if ($asked.serial_number) {
        Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'BIOSSerialNumber' = [string]$asked.serial_number }
    }
    if ($asked.asset_tag) {
        Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'ChassisAssetTag' = [string]$asked.asset_tag }
    }
    Update-System $computer $settings

    $items = @($settings.GetRelated('Msvm_KvpExchangeComponentSettingData') | ForEach-Object { $_.HostExchangeItems })
    $offered = @(Get-OfferedNames $items)
    foreach ($key in @($asked.Keys)) {
        if (([string]$key).StartsWith('kvp.')) {
            Set-KvpItem $service $computer $Namespace $offered (([string]$key).Substring(4)) ([string]$asked[$key])
        }
    }
    @{}
}
