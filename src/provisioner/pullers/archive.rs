//! Imports images from archives. Not built yet: says so.

use std::path::Path;
use std::sync::Arc;

use crate::model::ImageId;
use crate::model::error::{Error, Kind, Result};
use crate::provisioner::engine::Inner;

pub(in crate::provisioner) async fn load(_inner: &Arc<Inner>, _path: &Path) -> Result<Vec<ImageId>> {
    Err(Error::new(Kind::Unimplemented, "load image archive"))
}
