# Make the machine unless its name or uuid is taken, and write its notes at once; what fails is undone here.
Invoke-Operation {
    $asked = Read-Parameters
    $uuid = ([string]$asked.uuid).ToLowerInvariant()
    $name = [string]$asked.name
    $folder = [string]$asked.folder
    $memory = [long]$asked.memory
    if (-not [System.IO.Directory]::Exists($folder)) { Stop-Operation 'not-found' ('there is no folder ' + $folder) }
    $lock = Enter-Creation
    try {
        foreach ($other in @(Hyper-V\Get-VM)) {
            if ([string]$other.Name -eq $name) { Stop-Operation 'exists' ('a machine is named ' + $name + ' already') }
            if ((Get-Ownership ([string]$other.Notes))['first'] -eq $uuid) { Stop-Operation 'exists' ('a machine has the uuid ' + $uuid + ' already') }
        }
        if (Test-Parameter 'Hyper-V\New-VM' 'Generation') {
            $vm = Hyper-V\New-VM -Name $name -MemoryStartupBytes $memory -NoVHD -Path $folder -Generation ([int]$asked.generation)
        } else {
            if ([int]$asked.generation -ne 1) { Stop-Operation 'unsupported' 'this host knows generation 1 only' }
            $vm = Hyper-V\New-VM -Name $name -MemoryStartupBytes $memory -NoVHD -Path $folder
        }
        try {
            Hyper-V\Set-VM -VM $vm -Notes (Get-NotesText $uuid ([string]$asked.spec) 'building')
            Hyper-V\Set-VM -VM $vm -StaticMemory -ProcessorCount ([long]$asked.cpus) -AutomaticStartAction 'Nothing' -AutomaticStopAction 'ShutDown'
            # Checkpoints put a differencing disk between the machine and the disk that was made for it.
            if (Test-Parameter 'Hyper-V\Set-VM' 'AutomaticCheckpointsEnabled') {
                Hyper-V\Set-VM -VM $vm -AutomaticCheckpointsEnabled $false
            }
        } catch {
            Hyper-V\Remove-VM -VM $vm -Force
            throw
        }
    } finally {
        $lock.ReleaseMutex()
        $lock.Close()
    }
    @{ 'id' = [string]$vm.Id }
}
