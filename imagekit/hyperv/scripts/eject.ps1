# Take the medium out of every DVD drive.
Invoke-Operation {
    $asked = Read-Parameters
    $vm = Get-Machine ([string]$asked.id)
    foreach ($drive in @(Hyper-V\Get-VMDvdDrive -VM $vm)) {
        if ($drive.Path) { Hyper-V\Set-VMDvdDrive -VMDvdDrive $drive -Path $null }
    }
    @{}
}
