"""Top-level settings of ``#cloud-config``, with their types: a table of our own.

Written from cloud-init's documentation ("Module reference", "Core configuration"), with what older versions knew
and newer ones still take. It knows no more than types: cloud-init's own schema, where cloud-init is installed,
knows the rest.
"""

from __future__ import annotations

B, S, N, L, D = "true or false", "text", "a number", "a list", "fields"

KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *(
                "bootcmd",
                "runcmd",
                "write_files",
                "mounts",
                "mount_default_fields",
                "fs_setup",
                "ssh_authorized_keys",
            ),
            *("ssh_genkeytypes", "ssh_fp_console_blacklist", "ssh_key_console_blacklist", "datasource_list"),
            *("cloud_init_modules", "cloud_config_modules", "cloud_final_modules", "unverified_modules"),
            *("packages", "ssh_import_id", "log_cfgs", "apt_sources", "drivers_list"),
        ),
        (L,),
    ),
    **dict.fromkeys(
        (
            *("ansible", "apk_repos", "apt", "autoinstall", "bootstrap", "ca-certs", "ca_certs", "chef", "chpasswd"),
            *("datasource", "device_aliases", "disk_setup", "drivers", "fan", "growpart", "grub-dpkg", "grub_dpkg"),
            *("keyboard", "landscape", "lxd", "mcollective", "network", "output", "phone_home", "power_state"),
            *("puppet", "random_seed", "reporting", "resolv_conf", "rh_subscription", "rpi", "salt_minion", "snap"),
            *("snappy", "spacewalk", "ssh", "ssh_keys", "ssh_publish_hostkeys", "swap", "system_info"),
            *("ubuntu_advantage", "ubuntu_pro", "updates", "vendor_data", "vendor_data2", "wireguard", "yum_repos"),
            *("zypper", "raspberry_pi", "fqdn_options"),
        ),
        (D,),
    ),
    **dict.fromkeys(
        (
            *("allow_public_ssh_keys", "apt_preserve_sources_list", "create_hostname_file", "disable_root"),
            *("manage_resolv_conf", "migrate", "no_ssh_fingerprints", "package_reboot_if_required"),
            *("package_update", "package_upgrade", "apt_update", "apt_upgrade", "preserve_hostname"),
            *("prefer_fqdn_over_hostname", "ssh_deletekeys", "ssh_quiet_keygen", "disable_ec2_metadata"),
            *("manual_cache_clean", "apt_reboot_if_required", "allow_userdata"),
        ),
        (B,),
    ),
    **dict.fromkeys(
        (
            *("apt_mirror", "apt_http_proxy", "apt_https_proxy", "apt_ftp_proxy", "apt_proxy", "authkey_hash"),
            *("byobu_by_default", "disable_root_opts", "final_message", "fqdn", "hostname", "locale_configfile"),
            *("password", "timezone", "def_log_file", "syslog_fix_perms", "apt_pipelining_os", "merge_type"),
            *("yum_repo_dir", "resize_rootfs_tmp", "encoding", "instance-id", "cloud_name"),
        ),
        (S,),
    ),
    "apt_pipelining": (B, S, N),
    "groups": (L, D, S),
    "launch-index": (N,),
    "locale": (S, B),
    "manage_etc_hosts": (B, S),
    "merge_how": (L, S),
    "ntp": (D,),
    "resize_rootfs": (B, S),
    "rsyslog": (L, D),
    "ssh_pwauth": (B, S),
    "user": (S, D),
    "users": (L, S, D),
    "version": (S, N),
}
NULLABLE = frozenset(("ntp", "locale", "packages", "users"))

WINDOWS_KEYS = frozenset(
    ("write_files", "set_timezone", "timezone", "set_hostname", "hostname", "groups", "users", "ntp", "runcmd")
)
"""What cloudbase-init does of a ``#cloud-config``; its own names beside cloud-init's."""
FLATCAR_KEYS = frozenset(("ssh_authorized_keys", "coreos", "hostname", "users", "write_files", "manage_etc_hosts"))
"""What Flatcar's coreos-cloudinit does."""


def type_name(value: object) -> str:
    """The name of a value's type, as in `KEYS`."""
    if isinstance(value, bool):
        return B
    if isinstance(value, int | float):
        return N
    if isinstance(value, list):
        return L
    if isinstance(value, dict):
        return D
    return "nothing" if value is None else S
