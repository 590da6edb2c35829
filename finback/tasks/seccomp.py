"""A seccomp filter for code that a model wrote, as the bytes that Linux and bubblewrap read. Does not import torch.

It denies new processes, sockets, signals, and calls that could affect other processes or outlive the program. Namespaces
do not prevent all of these: a vsock socket escapes them, and memory files are not counted as a process's memory.
"""

import platform
import struct
import sys

# Call numbers on x86_64 and aarch64; - if the machine has no such call.
_DENIED = """
    fork 57 -, vfork 58 -, socket 41 198, kill 62 129, tkill 200 130, tgkill 234 131,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_open 434 434,
    pidfd_getfd 438 438, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271,
    setpriority 141 140, sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118,
    ioprio_set 251 30, shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180, memfd_create 319 279,
    memfd_secret 447 447, add_key 248 217, request_key 249 218, keyctl 250 219, unshare 272 97,
    setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, bpf 321 280,
    perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425, io_uring_enter 426 426,
    io_uring_register 427 427, open_by_handle_at 304 265, init_module 175 105, finit_module 313 273,
    kexec_load 246 104
"""
_FOLDERS = "mkdir 83 -, mkdirat 258 34"
_CLONE, _CLONE3, _PRLIMIT = (56, 220), 435, (302, 261)
_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020080  # a thread; any new namespace
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000  # the x86_64 kernel's second set of numbers for the same calls

_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets into struct seccomp_data
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026


def call_filter(may_fork: bool, may_make_folders: bool = True) -> bytes:
    """The filter as an array of struct sock_filter; empty if the machine's call numbers are unknown."""
    if not sys.platform.startswith("linux") or platform.machine() not in _ARCHITECTURES:
        return b""
    column, audit = _ARCHITECTURES[platform.machine()]
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for _, *numbers in map(str.split, (_DENIED if may_make_folders else f"{_DENIED}, {_FOLDERS}").split(",")):
        number = int(numbers[column]) if numbers[column] != "-" else None
        if number is not None and not (may_fork and number in (57, 58) and column == 0):
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    # clone3 has its flags in memory, where a filter cannot see them; glibc falls back to clone.
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ENOSYS)]
    # prlimit may only address the calling process (pid 0).
    code += [(_EQUAL, 0, 4, _PRLIMIT[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 0, 1, 0)]
    code += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    code += [(_EQUAL, 1, 0, _CLONE[column]), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    code += [(_HAS_BITS, 0, 1, _CLONE_NEW), (_RETURN, 0, 0, _EPERM)]
    if not may_fork:
        code += [(_HAS_BITS, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _EPERM)]
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)
