"""``dog vdi resize``: a vdi grows."""

from __future__ import annotations

from dataclasses import replace

from sheepdog.model.limits import HYPERVOLUME_BYTES_MAX, flat_bytes_max
from sheepdog_cli.dog_commands.common import failing_with, open_inode, volume_size
from sheepdog_cli.session import Session, misuse


def run(session: Session) -> None:
    text = session.argument(1)
    if text is None:
        misuse("Please specify the new size for the VDI")
    size = volume_size(text)
    inode = open_inode(session, session.arguments[0], header_only=True)
    header = inode.header
    if header.is_hypervolume:
        if size > HYPERVOLUME_BYTES_MAX:
            misuse(f"New VDI size is too large This volume's max size is {HYPERVOLUME_BYTES_MAX}")
    elif size > flat_bytes_max(header.block_size_shift):
        misuse(f"New VDI size is too large. This volume's max size is {flat_bytes_max(header.block_size_shift)}")
    if size < header.vdi_size:
        misuse("Shrinking VDIs is not implemented")
    with failing_with("Failed to update an inode header"):
        inode.write_header(replace(header, vdi_size=size))
