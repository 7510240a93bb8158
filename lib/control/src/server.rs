//! Serving the local API: the socket file, the shapes of answers, the loop.
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! use axum::{Router, routing::get};
//! use tidemark_control::{Done, server::{self, Ok, Socket}};
//!
//! let routes = Router::new().route("/v1/status", get(async || Ok(Done {})));
//! let socket = Socket::bind("/run/tidemark/agent.sock".as_ref())?;
//! server::serve(socket, routes, std::future::pending()).await
//! # }
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, rejection::JsonRejection};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Answer, ApiError};

/// The longest request body that is taken.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// Who may connect: the owner and the group.
const SOCKET_MODE: u32 = 0o660;

/// A successful answer: the body's fields and the schema version.
#[derive(Clone, Debug)]
pub struct Ok<T>(pub T);

impl<T: Serialize> IntoResponse for Ok<T> {
    fn into_response(self) -> Response {
        axum::Json(Answer::new(self.0)).into_response()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, axum::Json(self)).into_response()
    }
}

/// A request body in JSON; what does not fit is answered in the one shape of failures.
#[derive(Clone, Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let parsed: Result<axum::Json<T>, JsonRejection> =
            axum::Json::from_request(request, state).await;
        match parsed {
            Result::Ok(axum::Json(body)) => Result::Ok(Body(body)),
            Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                Err(ApiError::bad_request(format!(
                    "the request is longer than the {BODY_BYTES_MAX} bytes that are taken"
                )))
            }
            Err(rejection) => Err(ApiError::bad_request(rejection.body_text())),
        }
    }
}

/// A listening socket file. It is removed when this is dropped, unless another has replaced it.
#[derive(Debug)]
pub struct Socket {
    listener: net::UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Listens on `path`, mode 0660. A socket file that a dead process has left is replaced; the
    /// directory is made if it is missing.
    ///
    /// # Errors
    /// `AddrInUse` when a living process answers there; else what the filesystem says, with the
    /// path.
    pub fn bind(path: &Path) -> io::Result<Socket> {
        let at = |error: io::Error| {
            io::Error::new(error.kind(), format!("cannot listen on {}: {error}", path.display()))
        };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(at)?;
        }
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(error)),
            Result::Ok(metadata) => {
                if !metadata.file_type().is_socket() {
                    let error = io::Error::other("a file that is no socket is in the way");
                    return Err(at(error));
                }
                if net::UnixStream::connect(path).is_ok() {
                    let error = io::Error::new(
                        io::ErrorKind::AddrInUse,
                        "another process answers there; stop that first",
                    );
                    return Err(at(error));
                }
            }
        }
        // Made beside its place and moved there, so that nobody sees it with other permissions.
        let fresh = path.with_extension("new");
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(error)),
            _ => {}
        }
        let listener = net::UnixListener::bind(&fresh).map_err(at)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(SOCKET_MODE)).map_err(at)?;
        let inode = fs::symlink_metadata(&fresh).map_err(at)?.ino();
        fs::rename(&fresh, path).map_err(at)?;
        listener.set_nonblocking(true).map_err(at)?;
        Result::Ok(Socket { listener, path: path.to_owned(), inode })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            // It may stay behind: the next start replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Answers requests until `stop` completes; requests under way are finished first.
///
/// Unknown paths and methods are answered in the one shape of failures.
///
/// # Errors
/// The socket cannot be given to the runtime.
pub async fn serve(
    socket: Socket,
    routes: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = routes
        .fallback(async |request: Request| {
            ApiError::not_found(format!("there is no {} here", request.uri().path()))
        })
        .method_not_allowed_fallback(async |request: Request| {
            ApiError::bad_request(format!(
                "{} cannot be used with {}",
                request.uri().path(),
                request.method()
            ))
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX));
    let listener = tokio::net::UnixListener::from_std(socket.listener.try_clone()?)?;
    axum::serve(listener, routes).with_graceful_shutdown(stop).await
}

#[cfg(test)]
mod tests;
