# State, heartbeat, and addresses: as the guest tells them, and as the host's neighbour table has them.
Invoke-Operation {
    $asked = Read-Parameters
    $id = [string]$asked.id
    $vm = Get-Machine $id
    $addresses = @()
    foreach ($adapter in @(Hyper-V\Get-VMNetworkAdapter -VM $vm)) {
        foreach ($address in @($adapter.IPAddresses)) { if ($address) { $addresses += [string]$address } }
    }
    if ($addresses.Count -eq 0) {
        $filter = "SystemName='" + ([guid]$id).ToString().ToUpperInvariant() + "'"
        foreach ($exchange in @(Get-WmiObject -Namespace 'root\virtualization\v2' -Class 'Msvm_KvpExchangeComponent' -Filter $filter)) {
            $addresses += @(Get-ToldAddresses $exchange.GuestIntrinsicExchangeItems)
        }
    }
    @{
        'state' = [string]$vm.State
        'heartbeat' = [string]$vm.Heartbeat
        'addresses' = @($addresses)
        'neighbours' = @(Get-Neighbours $asked.macs)
    }
}
