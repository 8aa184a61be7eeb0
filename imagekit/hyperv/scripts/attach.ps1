# Disks and DVDs in their slots, start order, Secure Boot. What is in its slot already stays.
Invoke-Operation {
    $asked = Read-Parameters
    $vm = Get-Machine ([string]$asked.id)
    $second = (Test-Parameter 'Hyper-V\New-VM' 'Generation') -and ([int]$vm.Generation -eq 2)
    foreach ($medium in @($asked.media)) {
        $path = [string]$medium.path
        $number = [int]$medium.number
        $slot = [int]$medium.slot
        $place = [string]$medium.controller + ' ' + $number + ':' + $slot
        if (-not [System.IO.File]::Exists($path)) { Stop-Operation 'not-found' ('there is no file ' + $path) }
        if ([string]$medium.controller -eq 'SCSI') {
            while (@(Hyper-V\Get-VMScsiController -VM $vm).Count -le $number) { Hyper-V\Add-VMScsiController -VM $vm }
        }
        $disk = @(Hyper-V\Get-VMHardDiskDrive -VM $vm -ControllerType ([string]$medium.controller) -ControllerNumber $number -ControllerLocation $slot)
        $drive = @(Hyper-V\Get-VMDvdDrive -VM $vm -ControllerNumber $number -ControllerLocation $slot)
        if ($disk.Count -gt 0) {
            if ([string]$disk[0].Path -eq $path) { continue }
            Stop-Operation 'in-use' ($place + ' holds ' + $disk[0].Path)
        }
        if (($drive.Count -gt 0) -and $drive[0].Path -and ([string]$drive[0].Path -ne $path)) {
            Stop-Operation 'in-use' ($place + ' holds ' + $drive[0].Path)
        }
        if ([string]$medium.kind -eq 'dvd') {
            if ($drive.Count -gt 0) {
                Hyper-V\Set-VMDvdDrive -VMDvdDrive $drive[0] -Path $path
            } else {
                Hyper-V\Add-VMDvdDrive -VM $vm -ControllerNumber $number -ControllerLocation $slot -Path $path
            }
        } else {
            # A generation 1 machine comes with an empty drive at IDE 1:0.
            if ($drive.Count -gt 0) { Hyper-V\Remove-VMDvdDrive -VMDvdDrive $drive[0] }
            Hyper-V\Add-VMHardDiskDrive -VM $vm -ControllerType ([string]$medium.controller) -ControllerNumber $number -ControllerLocation $slot -Path $path
        }
    }
    if (-not $second) {
        Hyper-V\Set-VMBios -VM $vm -StartupOrder @('IDE', 'CD', 'LegacyNetworkAdapter', 'Floppy')
        @{}
        return
    }
    if (Test-Parameter 'Hyper-V\Set-VMFirmware' 'FirstBootDevice') {
        $first = @(Hyper-V\Get-VMHardDiskDrive -VM $vm -ControllerType 'SCSI' -ControllerNumber 0 -ControllerLocation 0)[0]
        Hyper-V\Set-VMFirmware -VM $vm -FirstBootDevice $first
        if (-not $asked.secure_boot) {
            Hyper-V\Set-VMFirmware -VM $vm -EnableSecureBoot 'Off'
        } elseif (Test-Parameter 'Hyper-V\Set-VMFirmware' 'SecureBootTemplate') {
            Hyper-V\Set-VMFirmware -VM $vm -EnableSecureBoot 'On' -SecureBootTemplate ([string]$asked.template)
        } elseif ([string]$asked.template -eq 'MicrosoftWindows') {
            Hyper-V\Set-VMFirmware -VM $vm -EnableSecureBoot 'On'
        } else {
            Stop-Operation 'unsupported' 'this host has no Secure Boot template for loaders other than those of Windows'
        }
    }
    @{}
}
