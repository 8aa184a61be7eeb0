# What this host is and can, changing nothing. Made to be posted: no names of people, machines, folders or switches.
function New-Check([string]$Name, [bool]$Good, [string]$Detail, [string]$Otherwise) {
    $status = 'ok'
    if (-not $Good) { $status = $Otherwise }
    return @{ 'name' = $Name; 'status' = $status; 'detail' = $Detail }
}

Invoke-Operation {
    $checks = @()
    $system = Get-WmiObject -Class 'Win32_OperatingSystem'
    $checks += New-Check 'windows' $true ([string]$system.Version + ' ' + [string]$system.Caption + ', language ' + $system.OSLanguage) 'failed'
    $checks += New-Check 'powershell' ($PSVersionTable.PSVersion.Major -ge 3) ([string]$PSVersionTable.PSVersion) 'failed'
    $module = @(Get-Module -ListAvailable -Name 'Hyper-V')
    $checks += New-Check 'hyper-v-module' ($module.Count -gt 0) ([string]::Join(', ', [string[]]@($module | ForEach-Object { [string]$_.Version }))) 'failed'

    # Every cmdlet and parameter that the scripts use without asking first.
    $needed = @{
        'Get-VM' = @('Id'); 'New-VM' = @('Name', 'MemoryStartupBytes', 'NoVHD', 'Path')
        'Set-VM' = @('VM', 'Notes', 'StaticMemory', 'ProcessorCount', 'AutomaticStartAction', 'AutomaticStopAction')
        'Remove-VM' = @('VM', 'Force'); 'Start-VM' = @('VM'); 'Stop-VM' = @('VM', 'TurnOff', 'Force')
        'Get-VMNetworkAdapter' = @('VM'); 'Remove-VMNetworkAdapter' = @('VMNetworkAdapter')
        'Add-VMNetworkAdapter' = @('VM', 'Name', 'SwitchName', 'StaticMacAddress', 'IsLegacy', 'Passthru')
        'Set-VMNetworkAdapterVlan' = @('VMNetworkAdapter', 'Access', 'VlanId')
        'Get-VMHardDiskDrive' = @('VM', 'ControllerType', 'ControllerNumber', 'ControllerLocation')
        'Add-VMHardDiskDrive' = @('VM', 'ControllerType', 'ControllerNumber', 'ControllerLocation', 'Path')
        'Get-VMDvdDrive' = @('VM', 'ControllerNumber', 'ControllerLocation'); 'Set-VMDvdDrive' = @('VMDvdDrive', 'Path')
        'Add-VMDvdDrive' = @('VM', 'ControllerNumber', 'ControllerLocation', 'Path'); 'Remove-VMDvdDrive' = @('VMDvdDrive')
        'Set-VMBios' = @('VM', 'StartupOrder'); 'Set-VMComPort' = @('VM', 'Number', 'Path')
        'Get-VMIntegrationService' = @('VM'); 'Enable-VMIntegrationService' = @('VMIntegrationService')
        'Get-VMScsiController' = @('VM'); 'Add-VMScsiController' = @('VM'); 'Get-VMSwitch' = @(); 'Get-VMHost' = @()
        'Get-VMSnapshot' = @('VM'); 'Remove-VMSnapshot' = @('VMSnapshot'); 'Test-VHD' = @('Path')
    }
    $missing = @(
        foreach ($name in @($needed.Keys | Sort-Object)) {
            $command = Get-Command -Name ('Hyper-V\' + $name) -ErrorAction SilentlyContinue
            if ($null -eq $command) { $name; continue }
            foreach ($parameter in $needed[$name]) { if (-not $command.Parameters.ContainsKey($parameter)) { $name + ' -' + $parameter } }
        }
    )
    $checks += New-Check 'cmdlets' ($missing.Count -eq 0) ('missing: ' + [string]::Join(', ', [string[]]$missing)) 'failed'
    $optional = @(
        foreach ($pair in @('New-VM Generation', 'Set-VMFirmware SecureBootTemplate', 'Set-VM AutomaticCheckpointsEnabled')) {
            $words = $pair.Split([char]32)
            if (Test-Parameter ('Hyper-V\' + $words[0]) $words[1]) { $pair }
        }
    )
    $checks += New-Check 'features' $true ([string]::Join(', ', [string[]]$optional)) 'failed'

    $seen = $true
    $detail = 'machines and settings can be seen'
    try {
        [void](Hyper-V\Get-VMHost)
        [void]@(Hyper-V\Get-VM)
    } catch {
        $seen = $false
        $detail = 'not a member of Hyper-V Administrators? (' + (Get-FailureKind $_) + ')'
    }
    $checks += New-Check 'rights' $seen $detail 'failed'
    if ($seen) {
        $switches = @(Hyper-V\Get-VMSwitch)
        $kinds = [string]::Join(', ', [string[]]@($switches | Group-Object -Property 'SwitchType' | ForEach-Object { [string]$_.Count + ' ' + $_.Name }))
        $checks += New-Check 'switches' ($switches.Count -gt 0) ($switches.Count.ToString() + ' switches: ' + $kinds) 'warning'
    }
    $service = @(Get-WmiObject -Namespace 'root\virtualization\v2' -Class 'Msvm_VirtualSystemManagementService')
    $checks += New-Check 'wmi' ($service.Count -eq 1) 'the management service of root\virtualization\v2' 'failed'
    $property = ([wmiclass]'root\virtualization\v2:Msvm_VirtualSystemSettingData').Properties
    $absent = @(foreach ($name in @('BIOSGUID', 'BIOSSerialNumber', 'ChassisAssetTag')) { if (-not (Test-Member $property $name)) { $name } })
    $checks += New-Check 'firmware-tables' ($absent.Count -eq 0) ('missing: ' + [string]::Join(', ', [string[]]$absent)) 'failed'
    foreach ($volume in @(Get-WmiObject -Class 'Win32_Volume' | Where-Object { $_.DriveType -eq 3 })) {
        $text = [string]$volume.FileSystem + ', ' + $volume.FreeSpace + ' of ' + $volume.Capacity + ' bytes free, compressed: ' + [string]$volume.Compressed
        $checks += New-Check 'volume' (-not $volume.Compressed) $text 'warning'
    }
    @{ 'checks' = @($checks) }
}
