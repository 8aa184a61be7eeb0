# Switch the machine on; one that runs already is fine.
Invoke-Operation {
    $asked = Read-Parameters
    $computer = Get-Machine ([string]$asked.id)
    if ((Get-StateName $computer) -ne 'Running') { Set-State $computer 2 100 }
    @{}
}
