# State, heartbeat, and addresses: as the guest tells them, and as the host's neighbour table has them.
Invoke-Operation {
    $asked = Read-Parameters
    $computer = Get-Machine ([string]$asked.id)
    $filter = "SystemName='" + (ConvertTo-Literal ([string]$computer.Name)) + "'"
    $names = @{ 2 = 'OkApplicationsUnknown'; 12 = 'NoContact'; 13 = 'LostCommunication' }
    $heartbeat = ''
    foreach ($part in @(Get-Objects 'Msvm_HeartbeatComponent' $filter)) {
        $code = [int]@($part.OperationalStatus)[0]
        $heartbeat = $code.ToString()
        if ($names.ContainsKey($code)) { $heartbeat = $names[$code] }
    }
    $addresses = @()
    foreach ($exchange in @(Get-Objects 'Msvm_KvpExchangeComponent' $filter)) {
        $addresses += @(Get-ToldAddresses $exchange.GuestIntrinsicExchangeItems)
    }
    $macs = @(for ($index = 0; $index -lt (Get-Count $asked 'macs'); $index++) { [string]$asked['macs.' + $index + '.'] })
    @{
        'state' = (Get-StateName $computer)
        'heartbeat' = $heartbeat
        'addresses' = @($addresses)
        'neighbours' = @(Get-Neighbours $macs)
    }
}
