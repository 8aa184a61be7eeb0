# What kind of host this is. In PowerShell 2.0 syntax: it is asked before anything is known.
Invoke-Operation {
    $system = Get-WmiObject -Class 'Win32_OperatingSystem'
    $version = [string]$system.Version
    $family = ''
    if ($version -match '^6\.1\.') { $family = '2008r2' }
    if ($version -match '^6\.2\.') { $family = '2012' }
    if ($version -match '^6\.3\.') { $family = '2012r2' }
    if ($version -match '^1\d\.') { $family = '2016' }
    if (-not $family) { Stop-Operation 'unsupported' ('Windows ' + $version + ': Windows Server 2008 R2 to 2025 are known') }
    $namespace = 'root\virtualization\v2'
    if (@('2008r2') -contains $family) { $namespace = 'root\virtualization' }
    try {
        $settings = @(Get-WmiObject -Namespace $namespace -Class 'Msvm_VirtualSystemManagementServiceSettingData')
    } catch {
        Stop-Operation 'unsupported' ('there is no Hyper-V here, or no right to see it: ' + $_.Exception.Message)
    }
    if ($settings.Count -eq 0) { Stop-Operation 'denied' 'Hyper-V shows this account nothing' }
    @{
        'family' = $family
        'store' = ([string]$settings[0].DefaultExternalDataRoot).TrimEnd([char]92)
        'os' = [string]$system.Caption
        'version' = $version
        'powershell' = [string]$PSVersionTable.PSVersion
    }
}
