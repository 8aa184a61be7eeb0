# Disks and DVDs in their slots, and the start order. What is in its slot already stays.
function Get-Drive($Settings, [string]$Controller, [int]$Slot) {
    foreach ($drive in @(Get-Resources $Settings 'Msvm_ResourceAllocationSettingData' '')) {
        $known = @('Microsoft Synthetic Disk Drive', 'Microsoft Synthetic DVD Drive') -contains [string]$drive.ResourceSubType
        if ($known -and ([string]$drive.Parent -eq $Controller) -and ([string]$drive.Address -eq $Slot.ToString())) { return $drive }
    }
}

Invoke-Operation {
    $asked = Read-Parameters
    $computer = Get-Machine ([string]$asked.id)
    for ($index = 0; $index -lt (Get-Count $asked 'media'); $index++) {
        $at = 'media.' + $index + '.'
        $path = [string]$asked[$at + 'path']
        $number = [int]$asked[$at + 'number']
        $slot = [int]$asked[$at + 'slot']
        $place = [string]$asked[$at + 'controller'] + ' ' + $number + ':' + $slot
        if ([string]$asked[$at + 'controller'] -ne 'IDE') { Stop-Operation 'unsupported' ($place + ': a generation 1 machine has its media on IDE') }
        if (-not [System.IO.File]::Exists($path)) { Stop-Operation 'not-found' ('there is no file ' + $path) }
        $settings = Get-Settings $computer
        $controller = @(Get-Resources $settings 'Msvm_ResourceAllocationSettingData' 'Microsoft Emulated IDE Controller' | Where-Object { [string]$_.Address -eq $number.ToString() })
        if ($controller.Count -ne 1) { Stop-Operation 'not-found' ($place + ': the machine has no such controller') }
        $there = Get-Drive $settings ([string]$controller[0].__PATH) $slot
        $held = @()
        if ($null -ne $there) {
            $held = @(Get-Resources $settings 'Msvm_ResourceAllocationSettingData' '' | Where-Object { (@('Microsoft Virtual Hard Disk', 'Microsoft Virtual CD/DVD Disk') -contains [string]$_.ResourceSubType) -and ([string]$_.Parent -eq [string]$there.__PATH) })
        }
        if ($held.Count -gt 0) {
            if ([string]@($held[0].Connection)[0] -eq $path) { continue }
            Stop-Operation 'in-use' ($place + ' holds ' + @($held[0].Connection)[0])
        }
        if ($null -ne $there) { Remove-Resource $computer $there }
        $driveType = 'Microsoft Synthetic Disk Drive'
        $mediumType = 'Microsoft Virtual Hard Disk'
        if ([string]$asked[$at + 'kind'] -eq 'dvd') {
            $driveType = 'Microsoft Synthetic DVD Drive'
            $mediumType = 'Microsoft Virtual CD/DVD Disk'
        }
        $drive = Get-Template 'Msvm_ResourceAllocationSettingData' $driveType
        Set-Properties $drive 'Msvm_ResourceAllocationSettingData' @{ 'Parent' = [string]$controller[0].__PATH; 'Address' = [string]$slot }
        $made = Add-Resource $computer $drive
        try {
            $medium = Get-Template 'Msvm_ResourceAllocationSettingData' $mediumType
            Set-Properties $medium 'Msvm_ResourceAllocationSettingData' @{ 'Parent' = [string]$made; 'Connection' = [string[]]@($path) }
            [void](Add-Resource $computer $medium)
        } catch {
            Remove-Resource $computer ([wmi]$made)
            throw
        }
    }
    $settings = Get-Settings $computer
    # Disk, DVD, network, floppy.
    Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'BootOrder' = [uint16[]]@(2, 1, 3, 0) }
    Update-System $computer $settings
    @{}
}
