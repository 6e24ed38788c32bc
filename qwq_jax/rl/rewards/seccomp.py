"""A filter of system calls for programs in the sandbox, as the bytes that the kernel takes.

Namespaces hide the machine; this keeps a program to one process and takes the calls away that it has no need of, and
that get round a limit (shared memory outside the address space), round a namespace (vsock) or into the kernel's
corners (bpf, io_uring, keyrings). What is refused fails with EPERM, as it does for lack of a right. Threads may be
started.

Source of the layout: Linux, Documentation/userspace-api/seccomp_filter.rst and include/uapi/linux/{seccomp,filter}.h.
"""

import struct

# Numbers of the calls, as in the kernel's tables; None where an architecture has no such call.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # name: (x86_64, aarch64)
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "socket": (41, 198),
}
_CLONE = (56, 220)
_CLONE3 = 435
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# Numbers from here on are those of the x32 interface, under which every call exists once more.
_X32 = 0x40000000
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# Offsets in struct seccomp_data.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16


def call_filter(machine: str) -> bytes | None:
    """The filter for a machine, as ``os.uname().machine`` calls it; None for one whose calls are not known here."""
    if machine not in _ARCHITECTURES:
        return None
    column, architecture = _ARCHITECTURES[machine]
    refused = [numbers[column] for numbers in _CALLS.values() if numbers[column] is not None]
    checks = [(_AT_LEAST, _X32), *((_EQUAL, number) for number in refused)]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        # Each check that holds jumps to the first refusal behind the last one.
        *((code, len(checks) - index + 3, 0, value) for index, (code, value) in enumerate(checks)),
        # The C library tries clone3 first, and clone, whose flags can be read here, where it is missing.
        (_EQUAL, 4, 0, _CLONE3),
        (_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 2, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _ERROR | _EPERM),
        (_RETURN, 0, 0, _ERROR | _ENOSYS),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in program)
