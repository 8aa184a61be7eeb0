"""OpenStack's image service: images from it, to it, and what happens inside it.

client.py       images found and read, created and deleted, through keystoneauth's session
properties.py   what an image asks of its machine, against what the caller asks
upload.py       a disk to an image
importing.py    what the import plugin's child does; the plugin itself is imagekit.glance_plugin, which Glance loads
"""
