# Reads a script and its parameters from standard input and runs it. Each line: a name, a colon, base64 of UTF-8.
# In PowerShell 2.0 syntax; comes as -EncodedCommand, so it must stay short.
$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
$text = ''
$values = @{}
foreach ($line in $input) {
    $name, $packed = ([string]$line).Trim().Split([char[]]@(':'), 2)
    if ($name) {
        $value = [System.Text.Encoding]::UTF8.GetString([System.Convert]::FromBase64String($packed))
        if ($name -ceq 'script') { $text = $value } else { $values[$name] = $value }
    }
}
& ([System.Management.Automation.ScriptBlock]::Create($text)) @values
