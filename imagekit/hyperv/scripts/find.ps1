# Machines with this uuid in their notes, or with this name. A machine without our line in its notes has no uuid here.
Invoke-Operation {
    $asked = Read-Parameters
    $uuid = ([string]$asked.uuid).ToLowerInvariant()
    $found = @(
        foreach ($vm in @(Hyper-V\Get-VM)) {
            $own = Get-Ownership ([string]$vm.Notes)
            if (($own['first'] -eq $uuid) -or ([string]$vm.Name -eq [string]$asked.name)) {
                @{
                    'id' = [string]$vm.Id
                    'name' = [string]$vm.Name
                    'uuid' = $own['uuid']
                    'spec' = $own['spec']
                    'stage' = $own['stage']
                    'state' = [string]$vm.State
                    'path' = [string]$vm.Path
                }
            }
        }
    )
    @{ 'machines' = $found }
}
