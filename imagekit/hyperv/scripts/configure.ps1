# Network adapters, serial pipe, firmware tables, key-value pairs, integration services. May be repeated.
Invoke-Operation {
    $asked = Read-Parameters
    $id = [string]$asked.id
    $vm = Get-Machine $id
    $namespace = 'root\virtualization\v2'

    # New-VM makes an adapter with a name in the host's language.
    foreach ($adapter in @(Hyper-V\Get-VMNetworkAdapter -VM $vm)) { Hyper-V\Remove-VMNetworkAdapter -VMNetworkAdapter $adapter }
    $switches = @(Get-SwitchNames)
    foreach ($nic in @($asked.nics)) {
        $legacy = [bool]$nic.legacy
        $mac = [string]$nic.mac
        if ($nic.switch) {
            $count = @($switches | Where-Object { $_ -ceq [string]$nic.switch }).Count
            if ($count -ne 1) { Stop-Operation 'not-found' ($count.ToString() + ' switches are named ' + $nic.switch) }
            $adapter = Hyper-V\Add-VMNetworkAdapter -VM $vm -Name ([string]$nic.name) -SwitchName ([string]$nic.switch) -StaticMacAddress $mac -IsLegacy $legacy -Passthru
        } else {
            $adapter = Hyper-V\Add-VMNetworkAdapter -VM $vm -Name ([string]$nic.name) -StaticMacAddress $mac -IsLegacy $legacy -Passthru
        }
        if ($nic.vlan) { Hyper-V\Set-VMNetworkAdapterVlan -VMNetworkAdapter $adapter -Access -VlanId ([int]$nic.vlan) }
    }

    Hyper-V\Set-VMComPort -VM $vm -Number 1 -Path ([string]$asked.pipe)

    # Heartbeat, key-value exchange, shutdown: by number, their names are in the host's language.
    $wanted = @('84EAAE65-2F2E-45F5-9BB5-0E857DC8EB47', '2A34B1C2-FD73-4043-8A5B-DD2159BC743F', '9F8233AC-BE49-4C79-8EE3-E7E1985B2077')
    foreach ($part in @(Hyper-V\Get-VMIntegrationService -VM $vm)) {
        foreach ($number in $wanted) {
            if (([string]$part.Id).ToUpperInvariant().EndsWith($number) -and -not $part.Enabled) {
                Hyper-V\Enable-VMIntegrationService -VMIntegrationService $part
            }
        }
    }

    # The uuid that firmware tells the guest is the one in our notes.
    $own = Get-Ownership ([string]$vm.Notes)
    $service = Get-ManagementService
    $settings = Get-Settings $id
    Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'BIOSGUID' = [string]('{' + $own['uuid'].ToUpperInvariant() + '}') }
    if ($asked.serial_number) {
        Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'BIOSSerialNumber' = [string]$asked.serial_number }
    }
    if ($asked.asset_tag) {
        Set-Properties $settings 'Msvm_VirtualSystemSettingData' @{ 'ChassisAssetTag' = [string]$asked.asset_tag }
    }
    [void](Invoke-Wmi $service 'ModifySystemSettings' @{ 'SystemSettings' = [string]$settings.GetText(1) })
    $uuid = [string](Get-Settings $id).BIOSGUID

    $filter = "Name='" + ([guid]$id).ToString().ToUpperInvariant() + "'"
    $computer = @(Get-WmiObject -Namespace $namespace -Class 'Msvm_ComputerSystem' -Filter $filter)[0]
    $items = @($computer.GetRelated('Msvm_VirtualSystemSettingData') | ForEach-Object { $_.GetRelated('Msvm_KvpExchangeComponentSettingData') } | ForEach-Object { $_.HostExchangeItems })
    $offered = @(Get-OfferedNames $items)
    foreach ($pair in @($asked.kvp.PSObject.Properties)) {
        if ($null -eq $pair) { continue }
        Set-KvpItem $service $computer $namespace $offered ([string]$pair.Name) ([string]$pair.Value)
    }
    @{ 'uuid' = $uuid.Trim([char[]]@('{', '}')).ToLowerInvariant() }
}
