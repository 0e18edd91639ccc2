//! One shard: a Parquet file with a row per sequence. `schema` is the layout, `write` and `read` follow it.

mod footer;
#[cfg(test)]
pub(crate) mod fuzz;
mod page;
mod pages;
mod read;
mod schema;
mod thrift;
mod write;

pub(crate) use footer::describe;
pub(crate) use page::can_unpack_to;
pub(crate) use read::{Shard, Workspace};
pub(crate) use schema::{column_infos, file_name, hidden_column};
pub(crate) use write::encode_shard;

#[cfg(target_endian = "big")]
compile_error!("caskd-formats hands little-endian buffers to and from the disk as they are");
