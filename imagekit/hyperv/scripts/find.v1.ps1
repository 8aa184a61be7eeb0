# Machines with this uuid in their notes, or with this name. A machine without our line in its notes has no uuid here.
Invoke-Operation {
    $asked = Read-Parameters
    $uuid = ([string]$asked.uuid).ToLowerInvariant()
    $found = @(
        foreach ($computer in @(Get-Machines)) {
            $settings = Get-Settings $computer
            $own = Get-Ownership ([string]$settings.Notes)
            if (($own['first'] -eq $uuid) -or ([string]$computer.ElementName -eq [string]$asked.name)) {
                $filter = "SystemName='" + (ConvertTo-Literal ([string]$computer.Name)) + "'"
                $shared = @(Get-Objects 'Msvm_VirtualSystemGlobalSettingData' $filter)
                $path = ''
                if ($shared.Count -gt 0) { $path = [string]$shared[0].ExternalDataRoot }
                @{
                    'id' = [string]$computer.Name
                    'name' = [string]$computer.ElementName
                    'uuid' = $own['uuid']
                    'spec' = $own['spec']
                    'stage' = $own['stage']
                    'state' = (Get-StateName $computer)
                    'path' = $path
                }
            }
        }
    )
    @{ 'machines' = $found }
}
