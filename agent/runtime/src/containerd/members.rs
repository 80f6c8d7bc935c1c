//! Whether any container of a pod has begun: what [`FirstInstruction`] means for a pod.
//!
//! Owns the finding of a pod's containers. Never waits long for one of them: a container that is being started keeps its
//! shim from answering, and then its state is unknown.
//!
//! A sandbox runs `pause`, which opens no socket: its start is no beginning. A container that has ended may have run, so it
//! leaves unknown what cannot be known.

use std::time::Duration;

use containerd_client::types::v1::Status;
use futures_util::future::join_all;
use pillion_workload::FirstInstruction;
use tokio::time::timeout;

use super::{
    Key,
    client::{Client, ClientError},
    record::{Record, cri_containers, first_instruction},
};

/// A container of the pod that is being started answers when that is over.
const PATIENCE: Duration = Duration::from_millis(300);
/// A pod with more is asked about no further; it has surely begun.
const LIMIT: usize = 64;

/// Asks containerd for the containers of the pod with this sandbox, and for the state of each.
pub(super) async fn of_pod(
    client: &Client,
    sandbox: &Key,
    record: &Record,
) -> Result<FirstInstruction, ClientError> {
    // The kubelet's label narrows the listing; other clients' containers are all read.
    let filter = match record.pod_uid_label() {
        Some((label, uid)) => format!("labels.{label:?}=={uid:?}"),
        None => cri_containers(),
    };
    let mut members = Vec::new();
    client
        .containers(&sandbox.namespace, vec![filter], |mut container| {
            let id = std::mem::take(&mut container.id);
            if Record::parse(container).sandbox() == Some(&sandbox.container) {
                members.push(id);
            }
        })
        .await?;
    let beyond = members.len() > LIMIT;
    members.truncate(LIMIT);
    let states = members.iter().map(|member| state(client, sandbox, member));
    let states = join_all(states).await.into_iter();
    Ok(together(states.chain(beyond.then_some(FirstInstruction::Unknown))))
}

async fn state(client: &Client, sandbox: &Key, member: &str) -> FirstInstruction {
    match timeout(PATIENCE, client.task(&sandbox.namespace, member)).await {
        Ok(Ok(Some(task))) => first_instruction(task.status()),
        // Without a task it is not created yet, or has ended.
        Ok(Ok(None) | Err(_)) | Err(_) => FirstInstruction::Unknown,
    }
}

/// The same, of states that are known already; `None` for a container without a task.
pub(super) fn of_states(states: impl Iterator<Item = Option<Status>>) -> FirstInstruction {
    together(states.map(|status| status.map_or(FirstInstruction::Unknown, first_instruction)))
}

/// One that has begun is enough; none has begun only if each has not.
fn together(states: impl Iterator<Item = FirstInstruction>) -> FirstInstruction {
    states.fold(FirstInstruction::Before, |all, one| match (all, one) {
        (FirstInstruction::After, _) | (_, FirstInstruction::After) => FirstInstruction::After,
        (FirstInstruction::Unknown, _) | (_, FirstInstruction::Unknown) => FirstInstruction::Unknown,
        (FirstInstruction::Before, FirstInstruction::Before) => FirstInstruction::Before,
    })
}

#[cfg(test)]
mod tests {
    use FirstInstruction::{After, Before, Unknown};

    use super::*;

    #[test]
    fn a_pod_has_begun_when_a_container_has() {
        for (states, pod) in [
            (&[][..], Before),
            (&[Some(Status::Created)], Before),
            (&[Some(Status::Created), Some(Status::Running)], After),
            (&[Some(Status::Stopped), Some(Status::Created)], Unknown),
            (&[None], Unknown),
            (&[None, Some(Status::Stopped), Some(Status::Paused)], After),
        ] {
            assert_eq!(of_states(states.iter().copied()), pod, "{states:?}");
        }
    }
}
