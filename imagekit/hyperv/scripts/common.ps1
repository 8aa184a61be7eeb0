# The beginning of every script: how it is asked, how it answers, what failures are called, how a job is waited for.
# In PowerShell 2.0 syntax, because Windows Server 2008 R2 runs it too. Nothing here looks at data as script.
param([string]$Parameters, [string]$Nonce)

$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
$WarningPreference = 'SilentlyContinue'
$ConfirmPreference = 'None'

# Ends the operation; Kind is one of the contract's words, the same in every language.
function Stop-Operation([string]$Kind, [string]$Message) {
    $problem = New-Object -TypeName 'System.InvalidOperationException' -ArgumentList $Message
    $problem.Data.Add('imagekit', $Kind)
    throw $problem
}

# The contract's word for a failure that is not ours. Messages are localised, so they decide only by their numbers.
function Get-FailureKind($Record) {
    $codes = @{ 5 = 'denied'; 2 = 'not-found'; 3 = 'not-found'; 32 = 'in-use'; 33 = 'in-use'; 80 = 'exists'; 183 = 'exists' }
    $cause = $Record.Exception
    while ($null -ne $cause) {
        if ($cause.Data.Contains('imagekit')) { return [string]$cause.Data['imagekit'] }
        if ($cause -is [System.UnauthorizedAccessException]) { return 'denied' }
        if ($cause -is [System.IO.FileNotFoundException]) { return 'not-found' }
        if ($cause -is [System.IO.DirectoryNotFoundException]) { return 'not-found' }
        $text = [string]$cause.Message
        if ($text -match '0xC03A001A') { return 'sparse' }
        if ($text -match '0x80070005') { return 'denied' }
        if ($text -match '0x80070020') { return 'in-use' }
        if ($cause -is [System.IO.IOException]) {
            $code = [System.Runtime.InteropServices.Marshal]::GetHRForException($cause) -band 0xFFFF
            if ($codes.ContainsKey($code)) { return $codes[$code] }
        }
        $cause = $cause.InnerException
    }
    switch ([string]$Record.CategoryInfo.Category) {
        'PermissionDenied' { return 'denied' }
        'ObjectNotFound' { return 'not-found' }
        'ResourceExists' { return 'exists' }
        'ResourceBusy' { return 'in-use' }
        'InvalidArgument' { return 'invalid' }
        'NotImplemented' { return 'unsupported' }
    }
    return 'failed'
}

function Get-FailureText($Record) {
    $cause = $Record.Exception
    while ($null -ne $cause.InnerException) { $cause = $cause.InnerException }
    return [string]$cause.Message
}

# JSON of dictionaries, lists, texts, numbers and truth: ConvertTo-Json is missing in 2.0, and cuts at depth 2 later.
function ConvertTo-Text($Value) {
    if ($null -eq $Value) { return 'null' }
    if ($Value -is [bool]) { if ($Value) { return 'true' } else { return 'false' } }
    if ($Value -is [System.Collections.IDictionary]) {
        $parts = @(foreach ($key in @($Value.Keys)) { (ConvertTo-Quoted ([string]$key)) + ':' + (ConvertTo-Text $Value[$key]) })
        return '{' + [string]::Join(',', [string[]]$parts) + '}'
    }
    if (($Value -is [System.Collections.IEnumerable]) -and -not ($Value -is [string])) {
        $parts = @(foreach ($item in $Value) { ConvertTo-Text $item })
        return '[' + [string]::Join(',', [string[]]$parts) + ']'
    }
    $whole = ($Value -is [int]) -or ($Value -is [long]) -or ($Value -is [uint32]) -or ($Value -is [uint64])
    if ($whole -or ($Value -is [uint16]) -or ($Value -is [byte])) { return ([System.IFormattable]$Value).ToString('D', [System.Globalization.CultureInfo]::InvariantCulture) }
    return ConvertTo-Quoted ([string]$Value)
}

function ConvertTo-Quoted([string]$Text) {
    $out = New-Object -TypeName 'System.Text.StringBuilder'
    [void]$out.Append([char]34)
    foreach ($sign in $Text.ToCharArray()) {
        $number = [int]$sign
        if (($number -lt 32) -or ($number -gt 126) -or ($number -eq 34) -or ($number -eq 92)) {
            [void]$out.Append('\u' + $number.ToString('x4'))
        } else {
            [void]$out.Append($sign)
        }
    }
    [void]$out.Append([char]34)
    return $out.ToString()
}

# Runs the body and prints its last value, or its failure, in the frame of this call.
function Invoke-Operation([scriptblock]$Body) {
    $answer = @{ 'ok' = $false }
    try {
        $values = @(& $Body)
        $answer['result'] = @{}
        if ($values.Count -gt 0) { $answer['result'] = $values[$values.Count - 1] }
        $answer['ok'] = $true
    } catch {
        $answer['error'] = @{ 'kind' = (Get-FailureKind $_); 'message' = (Get-FailureText $_) }
    }
    $bytes = [System.Text.Encoding]::UTF8.GetBytes((ConvertTo-Text $answer))
    '---imagekit ' + $Nonce + ' begin---'
    [System.Convert]::ToBase64String($bytes)
    '---imagekit ' + $Nonce + ' end---'
}

# Calls a method of a WMI object with named arguments, and waits for its job. Gives what came out.
# Codes: 0 done, 4096 a job; Allowed names those that mean "already so", such as 32775.
function Invoke-Wmi($Target, [string]$Method, $Values, $Allowed) {
    $call = $Target.GetMethodParameters($Method)
    foreach ($name in @($Values.Keys)) { $call.SetPropertyValue($name, $Values[$name]) }
    $out = $Target.InvokeMethod($Method, $call, $null)
    $code = [long]$out.GetPropertyValue('ReturnValue')
    if ($code -eq 4096) {
        Wait-WmiJob $Method ([string]$out.GetPropertyValue('Job'))
    } elseif (($code -ne 0) -and -not (@($Allowed) -contains $code)) {
        $kinds = @{ 32769 = 'denied'; 32770 = 'unsupported'; 32772 = 'timeout'; 32773 = 'invalid'; 32774 = 'in-use' }
        $kind = 'failed'
        if (($code -lt 65536) -and $kinds.ContainsKey([int]$code)) { $kind = $kinds[[int]$code] }
        Stop-Operation $kind ($Method + ' returned ' + $code)
    }
    return $out
}

# JobState: 2 new, 3 starting, 4 running, 7 done, 32768 done with warnings; everything else has failed.
function Wait-WmiJob([string]$Method, [string]$Path) {
    $end = [DateTime]::UtcNow.AddSeconds(300)
    $job = [wmi]$Path
    while (@(2, 3, 4) -contains [int]$job.JobState) {
        if ([DateTime]::UtcNow -gt $end) { Stop-Operation 'timeout' ($Method + ' is still at work after 300 seconds') }
        Start-Sleep -Milliseconds 300
        $job = [wmi]$Path
    }
    if (@(7, 32768) -contains [int]$job.JobState) { return }
    $text = [string]$job.ErrorDescription
    if (-not $text) { $text = [string]$job.ErrorSummaryDescription }
    $kind = 'failed'
    if ($text -match '0xC03A001A') { $kind = 'sparse' }
    if (($text -match '0x80070005') -or ([long]$job.ErrorCode -eq 32769)) { $kind = 'denied' }
    if ($text -match '0x80070020') { $kind = 'in-use' }
    Stop-Operation $kind ($Method + ' failed with ' + $job.ErrorCode + ': ' + $text)
}

# A machine's notes: the uuid, then a line of ours. Without that line the machine is somebody else's.
function Get-Ownership([string]$Notes) {
    $own = @{ 'first' = ''; 'uuid' = ''; 'spec' = ''; 'stage' = '' }
    $lines = @($Notes.Replace([string][char]13, '').Split([char]10))
    $own['first'] = $lines[0].Trim().ToLowerInvariant()
    if (($lines.Count -gt 1) -and ($lines[1] -match '^imagekit ([0-9a-f]{32}) (building|ready)$')) {
        $own['uuid'] = $own['first']
        $own['spec'] = $matches[1]
        $own['stage'] = $matches[2]
    }
    return $own
}

function Get-NotesText([string]$Uuid, [string]$Spec, [string]$Stage) {
    return $Uuid + [char]10 + 'imagekit ' + $Spec + ' ' + $Stage
}

# What the host's neighbour table says about these addresses (12 hexadecimal digits, with or without signs between).
function Get-Neighbours($Macs) {
    $wanted = @(foreach ($mac in @($Macs)) { ([string]$mac).Replace(':', '').Replace('-', '').ToUpperInvariant() })
    if ($wanted.Count -eq 0) { return }
    $arp = Join-Path -Path $env:SystemRoot -ChildPath 'System32\arp.exe'
    foreach ($line in @(& $arp '-a')) {
        if ([string]$line -match '^\s*(\d+\.\d+\.\d+\.\d+)\s+(([0-9a-fA-F]{2}-){5}[0-9a-fA-F]{2})') {
            $address = $matches[1]
            if ($wanted -contains $matches[2].Replace('-', '').ToUpperInvariant()) { $address }
        }
    }
}

# Addresses that the guest itself told, from the XML of its key-value items.
function Get-ToldAddresses($Items) {
    foreach ($item in @($Items)) {
        if (-not $item) { continue }
        $document = [xml]$item
        $name = ''
        $data = ''
        foreach ($property in @($document.INSTANCE.PROPERTY)) {
            if ($property.NAME -eq 'Name') { $name = [string]$property.VALUE }
            if ($property.NAME -eq 'Data') { $data = [string]$property.VALUE }
        }
        if (@('NetworkAddressIPv4', 'NetworkAddressIPv6') -contains $name) {
            foreach ($address in $data.Split([char]59)) { if ($address.Trim()) { $address.Trim() } }
        }
    }
}

# One creation at a time on this host: looking for twins and making the machine are one step.
function Enter-Creation {
    $mutex = New-Object -TypeName 'System.Threading.Mutex' -ArgumentList @($false, 'Global\imagekit-create')
    try {
        if (-not $mutex.WaitOne(60000)) { Stop-Operation 'in-use' 'another machine is being made on this host' }
    } catch [System.Threading.AbandonedMutexException] {
        # Its holder died: the lock is ours now.
        $abandoned = $true
    }
    return $mutex
}

function Get-Sha256([string]$Path) {
    $hasher = [System.Security.Cryptography.SHA256]::Create()
    $stream = [System.IO.File]::Open($Path, [System.IO.FileMode]::Open, [System.IO.FileAccess]::Read, [System.IO.FileShare]::Read)
    try {
        $bytes = $hasher.ComputeHash($stream)
    } finally {
        $stream.Close()
    }
    return [System.BitConverter]::ToString($bytes).Replace('-', '').ToLowerInvariant()
}

# Whether a WMI class has a property or method: asked by name, a collection throws where there is none.
function Test-Member($Members, [string]$Name) {
    foreach ($one in $Members) { if ([string]$one.Name -eq $Name) { return $true } }
    return $false
}

# Sets properties of a WMI object of Class: what the class does not have is an error before anything is sent.
function Set-Properties($Target, [string]$Class, $Values) {
    foreach ($name in @($Values.Keys)) {
        if (-not (Test-Member $Target.Properties $name)) { Stop-Operation 'unsupported' ($Class + ' has no ' + $name + ' on this host') }
        $Target.SetPropertyValue($name, $Values[$name])
    }
}

# The key-value pairs that the host offers this machine, by name.
function Get-OfferedNames($Items) {
    foreach ($item in @($Items)) {
        if (-not $item) { continue }
        foreach ($property in @(([xml]$item).INSTANCE.PROPERTY)) {
            if ($property.NAME -eq 'Name') { [string]$property.VALUE }
        }
    }
}

# Offers the guest a key-value pair, or changes the one of that name. Source 0: from the host.
function Set-KvpItem($Service, $Computer, [string]$Namespace, $Offered, [string]$Name, [string]$Data) {
    $item = ([wmiclass]($Namespace + ':Msvm_KvpExchangeDataItem')).CreateInstance()
    Set-Properties $item 'Msvm_KvpExchangeDataItem' @{ 'Name' = [string]$Name; 'Data' = [string]$Data; 'Source' = [uint16]0 }
    $method = 'AddKvpItems'
    if (@($Offered) -contains $Name) { $method = 'ModifyKvpItems' }
    [void](Invoke-Wmi $Service $method @{ 'TargetSystem' = [string]$Computer.__PATH; 'DataItems' = [string[]]@($item.GetText(1)) })
}

# What speaks against a folder: files made in it would be compressed or encrypted, or none can be made.
function Test-Store([string]$Folder, [string]$Name) {
    $attributes = [System.IO.File]::GetAttributes($Folder)
    foreach ($flag in @('Compressed', 'Encrypted')) {
        if ($attributes -band [System.IO.FileAttributes]$flag) {
            @{ 'kind' = 'sparse'; 'message' = $Folder + ' makes every file in it ' + $flag.ToLowerInvariant() + ', which Hyper-V refuses' }
        }
    }
    $probe = Join-Path -Path $Folder -ChildPath ($Name + '.probe')
    try {
        $stream = New-Object -TypeName 'System.IO.FileStream' -ArgumentList @($probe, [System.IO.FileMode]::CreateNew, [System.IO.FileAccess]::Write, [System.IO.FileShare]::None, 4096, [System.IO.FileOptions]::DeleteOnClose)
        $stream.Close()
    } catch {
        @{ 'kind' = 'denied'; 'message' = 'no file can be made in ' + $Folder + ': ' + (Get-FailureText $_) }
    }
}

# Free bytes of the volume that a folder is on, mount points included; nothing for a share.
function Get-FreeBytes([string]$Folder) {
    $best = $null
    $length = 0
    foreach ($volume in @(Get-WmiObject -Class 'Win32_Volume')) {
        $root = [string]$volume.Name
        if (-not $root.EndsWith([string][char]92)) { $root = $root + [char]92 }
        $inside = ($Folder.TrimEnd([char]92) + [char]92).StartsWith($root, [System.StringComparison]::OrdinalIgnoreCase)
        if ($inside -and ($root.Length -gt $length)) {
            $best = [uint64]$volume.FreeSpace
            $length = $root.Length
        }
    }
    return $best
}
