//! From a plan to a launch: user, variables, templates, arguments, environment. Both kinds of companions end here.

use std::{ffi::OsString, io, os::fd::AsFd, path::PathBuf};

use pillion_workload::{CompanionKind, Probe};

use crate::{
    builtin,
    cgroup::CgroupGuard,
    directory::CompanionDirectory,
    error::CompanionError,
    host::{HostConfig, Launch},
    launch::{
        Identity, LaunchSpec, Limit, LimitKind, Output, ParentDeath, Privileges, Program, Request, Session,
    },
    logs,
    render::Variables,
    user,
};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is worked out once for each start of a companion: who it runs as, and with which variables.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) directory: CompanionDirectory,
    pub(crate) identity: Identity,
    variables: Variables,
    environment: Vec<(OsString, OsString)>,
    die_with_parent: bool,
    /// Where it joins nothing, but leaves what the agent is in.
    leave: Vec<PathBuf>,
}

/// Makes the directory and renders the templates; those of a running companion are left alone. Blocks on files and on the user database.
pub(crate) fn prepare(host: &HostConfig, launch: &Launch, render: bool) -> Result<Prepared, CompanionError> {
    let identity = user::resolve_user(&launch.spec.user)?;
    let path = CompanionDirectory::path_of(&host.state_dir, &launch.workload, &launch.spec.name);
    let directory = CompanionDirectory::open(path, &identity)?;
    let variables = variables(launch, &directory);
    if let CompanionKind::Exec(exec) = &launch.spec.kind {
        let mut names: Vec<_> = exec.templates.iter().filter_map(|template| template.file_name()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(CompanionError::Directory {
                operation: "render a second template as",
                path: directory.path().join(pair[0]),
                source: io::ErrorKind::AlreadyExists.into(),
            });
        }
        for template in exec.templates.iter().filter(|_| render) {
            directory.render(template, &variables, &identity)?;
        }
    }
    let environment = environment(launch, &directory);
    let die_with_parent = host.die_with_parent;
    // Who dies with this process need not leave its cgroups.
    let leave = if die_with_parent { Vec::new() } else { host.cgroups.leave_files() };
    Ok(Prepared { directory, identity, variables, environment, die_with_parent, leave })
}

impl Prepared {
    /// The companion itself.
    pub(crate) fn main_request(
        &self,
        launch: &Launch,
        cgroup: &CgroupGuard,
    ) -> Result<Request, CompanionError> {
        let request = match &launch.spec.kind {
            CompanionKind::Exec(exec) => self.command_request(&exec.command, launch, cgroup)?,
            CompanionKind::Relay => self.request(builtin::program(launch)?, Vec::new(), launch, cgroup)?,
            CompanionKind::External(_) => return Err(CompanionError::NotOurs),
        };
        let log = self.directory.path().join(crate::directory::LOG);
        let open = |stream| logs::open_for_companion(&log, stream, &self.identity).map(Output::Given);
        let streams = open(logs::Stream::Output).and_then(|output| Ok((output, open(logs::Stream::Errors)?)));
        let (output, errors) = streams.map_err(|source| CompanionError::Logs { source })?;
        Ok(request.with_output(output, errors))
    }

    /// The command of an exec probe; `None` when the companion has none.
    pub(crate) fn probe_request(
        &self,
        launch: &Launch,
        cgroup: &CgroupGuard,
    ) -> Result<Option<Request>, CompanionError> {
        let Some(Probe::Exec { command }) = &launch.spec.ready.probe else { return Ok(None) };
        let request = self.command_request(command, launch, cgroup)?;
        Ok(Some(request.with_output(Output::Null, Output::Null)))
    }

    fn command_request(
        &self,
        command: &[String],
        launch: &Launch,
        cgroup: &CgroupGuard,
    ) -> Result<Request, CompanionError> {
        let command = self.render_all(command)?;
        let program = command.first().map(PathBuf::from).unwrap_or_default();
        if !program.is_absolute() {
            return Err(CompanionError::RelativeProgram { program: program.display().to_string() });
        }
        let arguments = command.into_iter().map(OsString::from).collect();
        self.request(Program::Path(program.into()), arguments, launch, cgroup)
    }

    fn render_all(&self, command: &[String]) -> Result<Vec<String>, CompanionError> {
        command
            .iter()
            .map(|argument| {
                self.variables.render(argument).map_err(|source| CompanionError::Render {
                    what: format!("the argument {argument:?}"),
                    source,
                })
            })
            .collect()
    }

    fn request(
        &self,
        program: Program,
        arguments: Vec<OsString>,
        launch: &Launch,
        cgroup: &CgroupGuard,
    ) -> Result<Request, CompanionError> {
        let netns = launch
            .netns
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| crate::netns::NetnsError { operation: "start a process", source })?;
        let spec = LaunchSpec {
            cgroups: [cgroup.procs_files(), self.leave.clone()].concat(),
            limits: vec![
                // A proxy needs two descriptors for each connection: all that the agent may give.
                Limit { kind: LimitKind::Descriptors, soft: None, hard: None },
                // No memory of a companion, which may hold keys, on a disk.
                Limit { kind: LimitKind::Core, soft: Some(0), hard: Some(0) },
            ],
            directory: Some(self.directory.path().to_owned()),
            session: Session::Session,
            umask: Some(0o027),
            identity: Some(self.identity.clone()),
            privileges: Privileges::None,
            parent_death: self.die_with_parent.then(|| ParentDeath {
                signal: libc::SIGKILL,
                parent: i32::try_from(std::process::id()).expect("pids are positive i32"),
            }),
            close_descriptors: true,
            reset_signals: true,
            ..LaunchSpec::new(program, arguments, self.environment.clone())
        };
        Ok(Request::new(spec).in_namespace(netns))
    }
}

fn variables(launch: &Launch, directory: &CompanionDirectory) -> Variables {
    let mut variables = Variables::default();
    for (name, port, reason) in [
        ("outboundPort", launch.ports.outbound, "no outbound redirection goes to this companion"),
        ("inboundPort", launch.ports.inbound, "no inbound redirection goes to this companion"),
        ("dnsPort", launch.ports.dns, "no questions to resolvers go to this companion"),
    ] {
        match port {
            Some(port) => variables.set(name, port.to_string()),
            None => variables.absent(name, reason),
        }
    }
    variables.set("workload", launch.workload.as_str());
    variables.set("name", launch.workload_name.as_str());
    match &launch.workload_namespace {
        Some(namespace) => variables.set("namespace", namespace.as_str()),
        None => variables.absent("namespace", "the workload's runtime has no namespaces"),
    }
    variables.set("companion", launch.spec.name.as_str());
    variables.set("dir", directory.path().to_string_lossy());
    variables
}

fn environment(launch: &Launch, directory: &CompanionDirectory) -> Vec<(OsString, OsString)> {
    let mut environment: Vec<(OsString, OsString)> = vec![
        ("PATH".into(), PATH.into()),
        ("HOME".into(), directory.path().join(crate::directory::RUN).into()),
        ("LANG".into(), "C.UTF-8".into()),
        ("PILLION_WORKLOAD".into(), launch.workload.as_str().into()),
        ("PILLION_COMPANION".into(), launch.spec.name.as_str().into()),
        // Go listens with Multipath TCP since 1.24; such sockets cannot be redirected to.
        ("GODEBUG".into(), "multipathtcp=0".into()),
    ];
    for (name, port) in [
        ("PILLION_OUTBOUND_PORT", launch.ports.outbound),
        ("PILLION_INBOUND_PORT", launch.ports.inbound),
        ("PILLION_DNS_PORT", launch.ports.dns),
    ] {
        if let Some(port) = port {
            environment.push((name.into(), port.to_string().into()));
        }
    }
    environment
}
