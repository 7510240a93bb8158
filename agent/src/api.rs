//! The agent's local API: routes over [`Control`], which the running agent is.
//!
//! The requests and answers are those of [`tidemark_control::agent`].

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::{get, post};
use tidemark_control::agent::{
    AgentStatus, MarkRequest, Marked, Reloaded, VerifyRequest, VerifyStarted, check_mark_name,
};
use tidemark_control::config::Name;
use tidemark_control::server::{Body, Ok as Answer};
use tidemark_control::{ApiError, Done};

/// What the running agent can be asked and told. Calls may come at any time and together.
pub trait Control: Send + Sync + 'static {
    /// Everything at the moment.
    fn status(&self) -> impl Future<Output = AgentStatus> + Send;

    /// Draws a mark in the group's order. Answers when it has its place, not when it is durable.
    fn mark(
        &self,
        group: &str,
        name: &str,
    ) -> impl Future<Output = Result<Marked, ApiError>> + Send;

    /// Begins to compare a volume, or all of the group, with the target.
    fn verify(
        &self,
        group: &str,
        volume: Option<&str>,
    ) -> impl Future<Output = Result<VerifyStarted, ApiError>> + Send;

    /// Looks at the configuration again: starts groups with a new file, stops those whose file is
    /// gone.
    fn reload(self: &Arc<Self>) -> impl Future<Output = Result<Reloaded, ApiError>> + Send;

    /// Stops a group: sends what is on its way, as far as the link lets it, and takes its devices
    /// away. Refused while a device is in use.
    fn stop_group(&self, group: &str) -> impl Future<Output = Result<(), ApiError>> + Send;
}

/// The routes of the agent's API.
pub fn routes<C: Control>(control: Arc<C>) -> Router {
    Router::new()
        .route("/v1/status", get(status::<C>))
        .route("/v1/reload", post(reload::<C>))
        .route("/v1/groups/{group}/mark", post(mark::<C>))
        .route("/v1/groups/{group}/verify", post(verify::<C>))
        .route("/v1/groups/{group}/stop", post(stop::<C>))
        .with_state(control)
}

async fn status<C: Control>(State(control): State<Arc<C>>) -> Answer<AgentStatus> {
    Answer(control.status().await)
}

async fn reload<C: Control>(State(control): State<Arc<C>>) -> Result<Answer<Reloaded>, ApiError> {
    to_its_end(async move { control.reload().await }).await.map(Answer)
}

async fn mark<C: Control>(
    State(control): State<Arc<C>>,
    Path(group): Path<String>,
    Body(request): Body<MarkRequest>,
) -> Result<Answer<Marked>, ApiError> {
    check_mark_name(&request.name)?;
    control.mark(known(&group)?, &request.name).await.map(Answer)
}

async fn verify<C: Control>(
    State(control): State<Arc<C>>,
    Path(group): Path<String>,
    Body(request): Body<VerifyRequest>,
) -> Result<Answer<VerifyStarted>, ApiError> {
    control.verify(known(&group)?, request.volume.as_deref()).await.map(Answer)
}

async fn stop<C: Control>(
    State(control): State<Arc<C>>,
    Path(group): Path<String>,
) -> Result<Answer<Done>, ApiError> {
    known(&group)?;
    to_its_end(async move { control.stop_group(&group).await }).await.map(|()| Answer(Done {}))
}

/// What changes groups comes to its end, even when who asked for it has gone away.
async fn to_its_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let ended = tokio::spawn(change).await;
    ended.unwrap_or_else(|_| Err(ApiError::internal("the agent failed; look at its log")))
}

/// Only what may be a group's name reaches the agent.
fn known(group: &str) -> Result<&str, ApiError> {
    match group.parse::<Name>() {
        Ok(_) => Ok(group),
        Err(error) => Err(ApiError::bad_request(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
