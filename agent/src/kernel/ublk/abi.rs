//! The structs and numbers of `include/uapi/linux/ublk_cmd.h`, as they are on the wire between us
//! and the driver. Native endian; every struct has its size pinned here and its bytes in the tests.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A control command, in the second half of a 128-byte submission (`struct ublksrv_ctrl_cmd`).
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
pub struct CtrlCmd {
    /// Device the command is for; [`ANY_DEVICE`] lets `ADD_DEV` choose.
    pub dev_id: u32,
    /// Queue, or [`NO_QUEUE`].
    pub queue_id: u16,
    /// Length of the buffer at `addr`.
    pub len: u16,
    /// Address of the command's buffer, in or out.
    pub addr: u64,
    /// The command's own number (a process id, for start and end of recovery).
    pub data: u64,
    /// For unprivileged devices only.
    pub dev_path_len: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub reserved: u32,
}

/// A device as the driver knows it (`struct ublksrv_ctrl_dev_info`).
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
pub struct DevInfo {
    /// Hardware queues.
    pub nr_hw_queues: u16,
    /// Requests per queue, at most [`MAX_QUEUE_DEPTH`].
    pub queue_depth: u16,
    /// One of the `STATE_` numbers.
    pub state: u16,
    /// Zero.
    pub pad0: u16,
    /// Largest request.
    pub max_io_buf_bytes: u32,
    /// The N of `/dev/ublkbN`.
    pub dev_id: u32,
    /// Process that serves it.
    pub ublksrv_pid: i32,
    /// Zero.
    pub pad1: u32,
    /// Features, bits of [`super::Features`].
    pub flags: u64,
    /// Kept for the server as it was given with `ADD_DEV`, not interpreted.
    pub ublksrv_flags: u64,
    /// Owner of an unprivileged device.
    pub owner_uid: u32,
    /// Owner of an unprivileged device.
    pub owner_gid: u32,
    /// Zero.
    pub reserved1: u64,
    /// Zero.
    pub reserved2: u64,
}

/// `struct ublk_param_basic`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
pub struct ParamBasic {
    /// Bits of `ATTR_`.
    pub attrs: u32,
    /// log2 of the logical block size, 9 to 12.
    pub logical_bs_shift: u8,
    /// log2 of the physical block size.
    pub physical_bs_shift: u8,
    /// log2 of the preferred large request.
    pub io_opt_shift: u8,
    /// log2 of the preferred smallest request.
    pub io_min_shift: u8,
    /// Largest request, in sectors of 512 bytes.
    pub max_sectors: u32,
    /// Requests do not cross multiples of this; 0: no such limit.
    pub chunk_sectors: u32,
    /// Size of the disk in sectors.
    pub dev_sectors: u64,
    /// Zero.
    pub virt_boundary_mask: u64,
}

/// `struct ublk_param_discard`, also with the limit of write-zeroes.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
pub struct ParamDiscard {
    /// Bytes to the first whole unit.
    pub discard_alignment: u32,
    /// Bytes in a unit; never zero.
    pub discard_granularity: u32,
    /// Largest discard in sectors; 0: none.
    pub max_discard_sectors: u32,
    /// Largest write-zeroes in sectors; 0: none.
    pub max_write_zeroes_sectors: u32,
    /// Must be 1.
    pub max_discard_segments: u16,
    /// Zero.
    pub reserved0: u16,
}

/// The head of `struct ublk_params` up to what we set; `len` tells the driver where it ends.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
pub struct Params {
    /// Size of this struct.
    pub len: u32,
    /// Bits of `PARAM_` for the parts that are set.
    pub types: u32,
    /// [`PARAM_BASIC`].
    pub basic: ParamBasic,
    /// [`PARAM_DISCARD`].
    pub discard: ParamDiscard,
    /// Zero; keeps the size a multiple of 8, as the kernel's is.
    pub pad: u32,
}

/// A queue command, in the command area of a submission (`struct ublksrv_io_cmd`).
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
pub struct IoCmd {
    /// Queue.
    pub q_id: u16,
    /// Request slot of the queue.
    pub tag: u16,
    /// Result of the request that is committed: bytes, or a negative error number.
    pub result: i32,
    /// Buffer for the payload; 0 with user copy.
    pub addr: u64,
}

/// A request, in memory shared with the driver (`struct ublksrv_io_desc`).
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
pub struct RawIoDesc {
    /// Operation in bits 0 to 7, flags above.
    pub op_flags: u32,
    /// Length in sectors.
    pub nr_sectors: u32,
    /// First sector.
    pub start_sector: u64,
    /// Buffer address the server gave.
    pub addr: u64,
}

const _: () = assert!(size_of::<CtrlCmd>() == 32);
const _: () = assert!(size_of::<DevInfo>() == 64);
const _: () = assert!(size_of::<ParamBasic>() == 32);
const _: () = assert!(size_of::<ParamDiscard>() == 20);
const _: () = assert!(size_of::<Params>() == 64);
const _: () = assert!(size_of::<IoCmd>() == 16);
const _: () = assert!(size_of::<RawIoDesc>() == 24);

/// `ADD_DEV` chooses the id.
pub const ANY_DEVICE: u32 = u32::MAX;
/// The command is not for a queue.
pub const NO_QUEUE: u16 = u16::MAX;

/// Most requests per queue; also the stride of the queues' descriptor arrays.
pub const MAX_QUEUE_DEPTH: u16 = 4096;
/// Largest payload of one request.
pub const MAX_IO_BYTES: u32 = 1 << 25;

/// Position in `/dev/ublkcN` of a queue's descriptor array.
pub const fn descriptors_position(queue: u16) -> u64 {
    queue as u64 * MAX_QUEUE_DEPTH as u64 * size_of::<RawIoDesc>() as u64
}

/// Part of [`Params`]: basic.
pub const PARAM_BASIC: u32 = 1 << 0;
/// Part of [`Params`]: discard and write-zeroes.
pub const PARAM_DISCARD: u32 = 1 << 1;

/// The disk refuses writes.
pub const ATTR_READ_ONLY: u32 = 1 << 0;
/// Seeks cost time.
pub const ATTR_ROTATIONAL: u32 = 1 << 1;
/// Send flushes.
pub const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// Send FUA on writes instead of a flush after them.
pub const ATTR_FUA: u32 = 1 << 3;

/// Made, not started, or stopped.
pub const STATE_DEAD: u16 = 0;
/// Served.
pub const STATE_LIVE: u16 = 1;
/// Its server is gone, requests wait.
pub const STATE_QUIESCED: u16 = 2;
/// Its server is gone, requests fail.
pub const STATE_FAIL_IO: u16 = 3;

/// Result of a fetch: the device is going away, do not fetch again.
pub const RES_ABORT: i32 = -libc::ENODEV;

/// Request operations.
pub const OP_READ: u8 = 0;
/// See [`OP_READ`].
pub const OP_WRITE: u8 = 1;
/// See [`OP_READ`].
pub const OP_FLUSH: u8 = 2;
/// See [`OP_READ`].
pub const OP_DISCARD: u8 = 3;
/// See [`OP_READ`].
pub const OP_WRITE_ZEROES: u8 = 5;

/// Request flag: durable when answered.
pub const IO_F_FUA: u32 = 1 << 13;
/// Request flag: zeroes must stay allocated.
pub const IO_F_NOUNMAP: u32 = 1 << 15;

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

/// `_IOC(direction, 'u', nr, size)`.
const fn ioc(direction: u32, nr: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | nr
}

const fn control(direction: u32, nr: u32) -> u32 {
    ioc(direction, nr, size_of::<CtrlCmd>())
}

const fn io(nr: u32) -> u32 {
    ioc(READ_WRITE, nr, size_of::<IoCmd>())
}

/// Control commands.
pub const CMD_GET_DEV_INFO: u32 = control(READ, 0x02);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_ADD_DEV: u32 = control(READ_WRITE, 0x04);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_DEL_DEV: u32 = control(READ_WRITE, 0x05);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_START_DEV: u32 = control(READ_WRITE, 0x06);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_STOP_DEV: u32 = control(READ_WRITE, 0x07);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_SET_PARAMS: u32 = control(READ_WRITE, 0x08);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_GET_PARAMS: u32 = control(READ, 0x09);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_START_USER_RECOVERY: u32 = control(READ_WRITE, 0x10);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_END_USER_RECOVERY: u32 = control(READ_WRITE, 0x11);
/// See [`CMD_GET_DEV_INFO`].
pub const CMD_GET_FEATURES: u32 = control(READ, 0x13);

/// Queue commands: hand out the first request.
pub const IO_FETCH_REQ: u32 = io(0x20);
/// Answer one request and hand out the next.
pub const IO_COMMIT_AND_FETCH_REQ: u32 = io(0x21);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_numbers_are_those_of_the_header() {
        assert_eq!(CMD_GET_DEV_INFO, 0x8020_7502);
        assert_eq!(CMD_ADD_DEV, 0xc020_7504);
        assert_eq!(CMD_DEL_DEV, 0xc020_7505);
        assert_eq!(CMD_START_DEV, 0xc020_7506);
        assert_eq!(CMD_STOP_DEV, 0xc020_7507);
        assert_eq!(CMD_SET_PARAMS, 0xc020_7508);
        assert_eq!(CMD_GET_PARAMS, 0x8020_7509);
        assert_eq!(CMD_START_USER_RECOVERY, 0xc020_7510);
        assert_eq!(CMD_END_USER_RECOVERY, 0xc020_7511);
        assert_eq!(CMD_GET_FEATURES, 0x8020_7513);
        assert_eq!(IO_FETCH_REQ, 0xc010_7520);
        assert_eq!(IO_COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }

    #[test]
    fn positions_in_the_character_device() {
        assert_eq!(descriptors_position(0), 0);
        assert_eq!(descriptors_position(1), 98_304);
    }

    #[test]
    fn structs_encode_as_the_header_lays_them_out() {
        let command = CtrlCmd {
            dev_id: 0x0403_0201,
            queue_id: 0x0605,
            len: 0x0807,
            addr: 0x100f_0e0d_0c0b_0a09,
            data: 0x1817_1615_1413_1211,
            dev_path_len: 0x1a19,
            pad: 0,
            reserved: 0,
        };
        let mut golden: Vec<u8> = (1..=26).collect();
        golden.resize(32, 0);
        assert_eq!(command.as_bytes(), golden);

        let command = IoCmd { q_id: 1, tag: 0x0203, result: -5, addr: 0x1122_3344_5566_7788 };
        let golden = [
            0x01, 0x00, 0x03, 0x02, 0xfb, 0xff, 0xff, 0xff, // queue, tag, result
            0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // address
        ];
        assert_eq!(command.as_bytes(), golden);

        let info = DevInfo {
            nr_hw_queues: 1,
            queue_depth: 128,
            state: STATE_QUIESCED,
            max_io_buf_bytes: 0x8_0000,
            dev_id: 7,
            ublksrv_pid: 0x1234,
            flags: 0xd8,
            ublksrv_flags: 0x99,
            owner_uid: 0xaa,
            owner_gid: 0xbb,
            ..DevInfo::default()
        };
        let mut golden = vec![
            1, 0, 128, 0, 2, 0, 0, 0, // queues, depth, state
            0, 0, 8, 0, 7, 0, 0, 0, // largest request, id
            0x34, 0x12, 0, 0, 0, 0, 0, 0, // process
            0xd8, 0, 0, 0, 0, 0, 0, 0, // flags
            0x99, 0, 0, 0, 0, 0, 0, 0, // server's flags
            0xaa, 0, 0, 0, 0xbb, 0, 0, 0, // owner
        ];
        golden.resize(64, 0);
        assert_eq!(info.as_bytes(), golden);
    }
}
