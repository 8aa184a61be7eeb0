# What this host is and has, changing nothing. Made to be posted: no names of people, machines, folders or switches.
function New-Check([string]$Name, [bool]$Good, [string]$Detail, [string]$Otherwise) {
    $status = 'ok'
    if (-not $Good) { $status = $Otherwise }
    return @{ 'name' = $Name; 'status' = $status; 'detail' = $Detail }
}

# What a class of this host lacks of the properties and methods that the scripts use.
function Get-Lacking([string]$Class, $Properties, $Methods) {
    try {
        $known = [wmiclass]($Namespace + ':' + $Class)
        foreach ($name in @($Properties)) { if (-not (Test-Member $known.Properties $name)) { $Class + '.' + $name } }
        foreach ($name in @($Methods)) { if (-not (Test-Member $known.Methods $name)) { $Class + '.' + $name + '()' } }
    } catch {
        $Class
    }
}

Invoke-Operation {
    $checks = @()
    $system = Get-WmiObject -Class 'Win32_OperatingSystem'
    $checks += New-Check 'windows' $true ([string]$system.Version + ' ' + [string]$system.Caption + ', language ' + $system.OSLanguage) 'failed'
    $checks += New-Check 'powershell' $true ([string]$PSVersionTable.PSVersion) 'failed'

    $missing = @()
    $missing += @(Get-Lacking 'Msvm_VirtualSystemManagementService' @() @('DefineVirtualSystem', 'DestroyVirtualSystem', 'ModifyVirtualSystem', 'AddVirtualSystemResources', 'RemoveVirtualSystemResources', 'ModifyVirtualSystemResources', 'AddKvpItems', 'ModifyKvpItems'))
    $missing += @(Get-Lacking 'Msvm_VirtualSwitchManagementService' @() @('CreateSwitchPort', 'DeleteSwitchPort'))
    $missing += @(Get-Lacking 'Msvm_ImageManagementService' @() @('ValidateVirtualHardDisk'))
    $missing += @(Get-Lacking 'Msvm_ComputerSystem' @('Name', 'ElementName', 'EnabledState') @('RequestStateChange'))
    $missing += @(Get-Lacking 'Msvm_VirtualSystemGlobalSettingData' @('ElementName', 'ExternalDataRoot', 'SnapshotDataRoot', 'AutomaticStartupAction', 'AutomaticShutdownAction', 'SystemName') @())
    $missing += @(Get-Lacking 'Msvm_VirtualSystemSettingData' @('SettingType', 'Notes', 'BootOrder', 'BIOSGUID', 'BIOSSerialNumber', 'ChassisAssetTag') @())
    $missing += @(Get-Lacking 'Msvm_ResourceAllocationSettingData' @('Parent', 'Address', 'Connection', 'ResourceType', 'ResourceSubType') @())
    $missing += @(Get-Lacking 'Msvm_SyntheticEthernetPortSettingData' @('ElementName', 'Address', 'StaticMacAddress', 'VirtualSystemIdentifiers', 'Connection') @())
    $missing += @(Get-Lacking 'Msvm_EmulatedEthernetPortSettingData' @('ElementName', 'Address', 'StaticMacAddress', 'Connection') @())
    $missing += @(Get-Lacking 'Msvm_MemorySettingData' @('VirtualQuantity', 'Reservation', 'Limit') @())
    $missing += @(Get-Lacking 'Msvm_ProcessorSettingData' @('VirtualQuantity', 'Reservation', 'Limit') @())
    $missing += @(Get-Lacking 'Msvm_VLANEndpointSettingData' @('AccessVLAN') @())
    $missing += @(Get-Lacking 'Msvm_KvpExchangeDataItem' @('Name', 'Data', 'Source') @())
    $checks += New-Check 'wmi-classes' ($missing.Count -eq 0) ('missing: ' + [string]::Join(', ', [string[]]$missing)) 'failed'

    $absent = @(
        foreach ($subtype in @('Microsoft Synthetic Disk Drive', 'Microsoft Synthetic DVD Drive', 'Microsoft Virtual Hard Disk', 'Microsoft Virtual CD/DVD Disk')) {
            try { [void](Get-Template 'Msvm_ResourceAllocationSettingData' $subtype) } catch { $subtype }
        }
        try { [void](Get-Template 'Msvm_SyntheticEthernetPortSettingData' 'Microsoft Synthetic Ethernet Port') } catch { 'Microsoft Synthetic Ethernet Port' }
        try { [void](Get-Template 'Msvm_EmulatedEthernetPortSettingData' 'Microsoft Emulated Ethernet Port') } catch { 'Microsoft Emulated Ethernet Port' }
    )
    $checks += New-Check 'defaults' ($absent.Count -eq 0) ('missing: ' + [string]::Join(', ', [string[]]$absent)) 'failed'

    $services = @(
        foreach ($class in @('Msvm_VirtualSystemManagementService', 'Msvm_VirtualSwitchManagementService', 'Msvm_ImageManagementService')) {
            if (@(Get-Objects $class '').Count -ne 1) { $class }
        }
    )
    $checks += New-Check 'rights' ($services.Count -eq 0) ('not seen: ' + [string]::Join(', ', [string[]]$services)) 'failed'
    $switches = @(Get-SwitchNames).Count
    $checks += New-Check 'switches' ($switches -gt 0) ($switches.ToString() + ' switches') 'warning'
    foreach ($volume in @(Get-WmiObject -Class 'Win32_Volume' | Where-Object { $_.DriveType -eq 3 })) {
        $text = [string]$volume.FileSystem + ', ' + $volume.FreeSpace + ' of ' + $volume.Capacity + ' bytes free, compressed: ' + [string]$volume.Compressed
        $checks += New-Check 'volume' (-not $volume.Compressed) $text 'warning'
    }
    @{ 'checks' = @($checks) }
}
