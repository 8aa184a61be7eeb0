# Attach a disk read-only, hash all of its content as Windows sees it, detach it. Works on every Windows since 8.
Invoke-Operation {
    $asked = Read-Parameters
    $path = [string]$asked.path
    if (-not [System.IO.File]::Exists($path)) { Stop-Operation 'not-found' ('there is no file ' + $path) }
    # FileStream opens no devices by name, so the handle is made here.
    Add-Type -TypeDefinition @'
using System;
using System.ComponentModel;
using System.IO;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using Microsoft.Win32.SafeHandles;

public static class ImagekitDisk
{
    [DllImport("kernel32.dll", CharSet = CharSet.Unicode, SetLastError = true)]
    static extern SafeFileHandle CreateFileW(string name, uint access, uint share, IntPtr security, uint creation, uint flags, IntPtr template);

    [DllImport("kernel32.dll", SetLastError = true)]
    static extern bool DeviceIoControl(SafeFileHandle device, uint code, IntPtr input, int inputSize, out long output, int outputSize, out int returned, IntPtr overlapped);

    const uint GenericRead = 0x80000000, ShareReadWrite = 3, OpenExisting = 3, GetLength = 0x0007405C;

    public static string Hash(string device, out long size)
    {
        using (SafeFileHandle handle = CreateFileW(device, GenericRead, ShareReadWrite, IntPtr.Zero, OpenExisting, 0, IntPtr.Zero))
        {
            int returned;
            if (handle.IsInvalid) throw new Win32Exception(Marshal.GetLastWin32Error());
            if (!DeviceIoControl(handle, GetLength, IntPtr.Zero, 0, out size, 8, out returned, IntPtr.Zero))
                throw new Win32Exception(Marshal.GetLastWin32Error());
            byte[] buffer = new byte[4 << 20];
            using (SHA256 hasher = SHA256.Create())
            using (FileStream stream = new FileStream(handle, FileAccess.Read, 4096))
            {
                long left = size;
                while (left > 0)
                {
                    int count = stream.Read(buffer, 0, (int)Math.Min(left, buffer.Length));
                    if (count <= 0) throw new EndOfStreamException();
                    hasher.TransformBlock(buffer, 0, count, null, 0);
                    left -= count;
                }
                hasher.TransformFinalBlock(buffer, 0, 0);
                return BitConverter.ToString(hasher.Hash).Replace("-", "").ToLowerInvariant();
            }
        }
    }
}
'@
    $attached = Storage\Get-DiskImage -ImagePath $path
    if ($attached.Attached) { Stop-Operation 'in-use' ($path + ' is attached already') }
    Storage\Mount-DiskImage -ImagePath $path -Access 'ReadOnly' -NoDriveLetter
    try {
        $device = [string](Storage\Get-DiskImage -ImagePath $path).DevicePath
        $size = [long]0
        $sha256 = [ImagekitDisk]::Hash($device, [ref]$size)
    } finally {
        Storage\Dismount-DiskImage -ImagePath $path
    }
    @{ 'size' = $size; 'sha256' = $sha256 }
}
