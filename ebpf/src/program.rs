//! Which program the current process executes: its path, as the process sees it, compared with those that are left alone.
//!
//! Walks names up from the program's file to the process's root, as d_path() does, across mounts. What cannot be read ends
//! the walk, and what then does not match is not left alone.

use aya_ebpf::helpers::generated::{bpf_get_current_task, bpf_probe_read_kernel, bpf_probe_read_kernel_str};
use pillion_common::{ExecutableKey, PATH_NAME_BYTES, PATH_NAMES};

use crate::maps::{
    OFF_DENTRY_NAME, OFF_DENTRY_PARENT, OFF_FILE_PATH, OFF_FS_ROOT, OFF_MM_EXE, OFF_MOUNT_PARENT,
    OFF_MOUNT_POINT, OFF_MOUNT_VFS, OFF_PATH_DENTRY, OFF_PATH_MOUNT, OFF_TASK_FS, OFF_TASK_MM, OFF_VFS_ROOT,
    PL_EXECUTABLES,
};

/// Mounts within each other that are gone through.
const MOUNTS: usize = 8;

/// Whether the current process's program is in the table's list. Most are not by their last name already.
#[inline(always)]
pub fn is_left_alone(table: u32) -> bool {
    // Loaded without knowing kernel structures: the kernel then leaves all of this out.
    if OFF_TASK_MM.load() == 0 {
        return false;
    }
    // SAFETY: takes nothing.
    let task = unsafe { bpf_get_current_task() };
    let mm = read(task + u64::from(OFF_TASK_MM.load()));
    let file = read(mm + u64::from(OFF_MM_EXE.load())) + u64::from(OFF_FILE_PATH.load());
    let root = read(task + u64::from(OFF_TASK_FS.load())) + u64::from(OFF_FS_ROOT.load());
    let (root_dentry, root_mount) =
        (read(root + u64::from(OFF_PATH_DENTRY.load())), read(root + u64::from(OFF_PATH_MOUNT.load())));
    let mut dentry = read(file + u64::from(OFF_PATH_DENTRY.load()));
    let mut mount = read(file + u64::from(OFF_PATH_MOUNT.load()));
    // Not a constant, for which the kernel would verify this path and all that come after it for themselves.
    let mut node = table;
    for _ in 0..PATH_NAMES + MOUNTS {
        if dentry == 0 {
            return false;
        }
        let parent = read(dentry + u64::from(OFF_DENTRY_PARENT.load()));
        let at_root = dentry == root_dentry && mount == root_mount;
        let mount_root = read(mount + u64::from(OFF_VFS_ROOT.load()));
        if at_root || dentry == mount_root || parent == dentry {
            let whole = mount - u64::from(OFF_MOUNT_VFS.load());
            let above = read(whole + u64::from(OFF_MOUNT_PARENT.load()));
            if at_root || above == whole || above == 0 {
                return node & ExecutableKey::END != 0;
            }
            dentry = read(whole + u64::from(OFF_MOUNT_POINT.load()));
            mount = above + u64::from(OFF_MOUNT_VFS.load());
            continue;
        }
        let mut key = ExecutableKey { table, node: node & !ExecutableKey::END, name: [0; PATH_NAME_BYTES] };
        let name = read(dentry + u64::from(OFF_DENTRY_NAME.load()));
        // SAFETY: the buffer is as long as is said.
        let length = unsafe {
            bpf_probe_read_kernel_str(key.name.as_mut_ptr().cast(), PATH_NAME_BYTES as u32, name as *const _)
        };
        // A name that fills its room is perhaps longer.
        if length <= 0 || length >= PATH_NAME_BYTES as i64 {
            return false;
        }
        // SAFETY: copied at once, before any other operation on the map.
        let Some(next) = (unsafe { PL_EXECUTABLES.get(key) }).copied() else { return false };
        node = next;
        dentry = parent;
    }
    false
}

/// A word of the kernel's; 0 where nothing can be read.
#[inline(always)]
fn read(address: u64) -> u64 {
    let mut value = 0_u64;
    // SAFETY: the destination is a value of that size; the helper checks the source.
    unsafe { bpf_probe_read_kernel((&raw mut value).cast(), 8, address as *const _) };
    value
}
