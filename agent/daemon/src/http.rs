//! The HTTP/1 server under the admin API and the health endpoints.
//!
//! Owns connections: their number, the time a client may take for its headers, and their end when the agent ends. Knows
//! nothing of what is served.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// More clients at once wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// A client that connects must say what it wants, and an idle one must ask again, within this time.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// What is being answered when the agent ends may take this long.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// When the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Where connections come from.
pub(crate) enum Listener {
    /// The admin socket.
    Unix(UnixListener),
    /// Health and metrics.
    Tcp(TcpListener),
}

enum Connection {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Listener {
    /// Binds to loopback or wherever it is told to.
    pub(crate) async fn tcp(address: SocketAddr) -> io::Result<Self> {
        TcpListener::bind(address).await.map(Self::Tcp)
    }

    async fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Connection::Unix(stream)),
            Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| Connection::Tcp(stream)),
        }
    }
}

/// Serves until told to stop.
pub(crate) async fn serve(listener: Listener, router: Router, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            listener.accept().await.map(|connection| (connection, place))
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((connection, place)) => {
                let (router, stop) = (router.clone(), stop.clone());
                tokio::spawn(async move {
                    match connection {
                        Connection::Unix(stream) => handle(stream, router, stop).await,
                        Connection::Tcp(stream) => handle(stream, router, stop).await,
                    }
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // All places free again: every connection has ended.
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    let _ = timeout(DRAIN_LIMIT * 2, places.acquire_many(all)).await;
}

async fn handle<S>(stream: S, router: Router, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            // Who follows events would stay for ever.
            match timeout(DRAIN_LIMIT, connection).await {
                Ok(result) => result,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = result {
        debug!(%error, "a connection ended early");
    }
}
