//! Option haggling as a state machine without I/O: an option goes in, reply bytes and the next
//! step come out. Source: `doc/proto.md`, "Option types" and "TLS support".

use bytes::BytesMut;

use crate::export::{ExportEntry, ExportInfo, OpenError};
use crate::proto::options::{
    BASE_ALLOCATION_ID, ClientFlags, ClientOption, InfoRequest, ReplyType, info, option, put_error,
    put_export_name_reply, put_info_block_size, put_info_export, put_info_text, put_meta_context,
    put_reply, put_server,
};

/// Whether the connection is, may be or must be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsState {
    Off,
    Offered,
    Required,
    Active,
}

/// What the driver does after sending the bytes that came with it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Read the next option.
    Continue,
    /// Ask the resolver for the list, then call [`Negotiation::list_entries`] and
    /// [`Negotiation::list_done`].
    List,
    /// Open an export, then call [`Negotiation::opened`] or [`Negotiation::refused`].
    Open { how: Opening, request: InfoRequest },
    /// Upgrade to TLS, then go on with [`Negotiation::after_tls`].
    StartTls,
    /// End the session; the reason is for the log.
    End(&'static str),
}

/// By which option an export is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    Info,
    Go,
    /// `EXPORT_NAME`: no reply header, and refusal is a disconnect.
    Bare,
}

impl Opening {
    fn number(self) -> u32 {
        match self {
            Self::Info => option::INFO,
            Self::Go => option::GO,
            Self::Bare => option::EXPORT_NAME,
        }
    }
}

pub(crate) struct Negotiation {
    client: ClientFlags,
    tls: TlsState,
    structured: bool,
    /// The export whose `base:allocation` is selected.
    allocation_of: Option<String>,
}

impl Negotiation {
    pub(crate) fn new(client: ClientFlags, tls: TlsState) -> Self {
        Self { client, tls, structured: false, allocation_of: None }
    }

    /// After the upgrade: encrypted, and all that was negotiated before is forgotten.
    pub(crate) fn after_tls(&self) -> Self {
        Self::new(self.client, TlsState::Active)
    }

    /// Takes one option with its data.
    pub(crate) fn option(&mut self, number: u32, data: &[u8], out: &mut BytesMut) -> Step {
        if !self.client.fixed_newstyle && number != option::EXPORT_NAME {
            return Step::End("an option from a client without fixed newstyle");
        }
        if self.tls == TlsState::Required {
            match number {
                option::STARTTLS | option::ABORT => {}
                option::EXPORT_NAME => {
                    return Step::End("EXPORT_NAME without TLS, which is required");
                }
                _ => {
                    let message = "this server requires TLS: start it with STARTTLS first";
                    put_error(out, number, ReplyType::ErrTlsReqd, message);
                    return Step::Continue;
                }
            }
        }
        match ClientOption::parse(number, data) {
            Ok(parsed) => self.parsed(parsed, out),
            Err(_) if number == option::EXPORT_NAME => Step::End("EXPORT_NAME with a bad name"),
            Err(message) => {
                if number == option::SET_META_CONTEXT {
                    self.allocation_of = None;
                }
                put_error(out, number, ReplyType::ErrInvalid, message);
                Step::Continue
            }
        }
    }

    fn parsed(&mut self, parsed: ClientOption, out: &mut BytesMut) -> Step {
        match parsed {
            ClientOption::Abort => {
                put_reply(out, option::ABORT, ReplyType::Ack, &[]);
                return Step::End("ABORT");
            }
            ClientOption::List => return Step::List,
            ClientOption::StartTls => return self.start_tls(out),
            ClientOption::ExportName(name) => {
                let request = InfoRequest { name, wanted: Vec::new() };
                return Step::Open { how: Opening::Bare, request };
            }
            ClientOption::Info(request) => return Step::Open { how: Opening::Info, request },
            ClientOption::Go(request) => return Step::Open { how: Opening::Go, request },
            ClientOption::StructuredReply => {
                self.structured = true;
                put_reply(out, option::STRUCTURED_REPLY, ReplyType::Ack, &[]);
            }
            ClientOption::ListMetaContext(request) => {
                if self.needs_structured(option::LIST_META_CONTEXT, out) {
                    if request.lists_allocation() {
                        put_meta_context(out, option::LIST_META_CONTEXT, 0);
                    }
                    put_reply(out, option::LIST_META_CONTEXT, ReplyType::Ack, &[]);
                }
            }
            ClientOption::SetMetaContext(request) => {
                self.allocation_of = None;
                if self.needs_structured(option::SET_META_CONTEXT, out) {
                    if request.selects_allocation() {
                        put_meta_context(out, option::SET_META_CONTEXT, BASE_ALLOCATION_ID);
                        self.allocation_of = Some(request.name);
                    }
                    put_reply(out, option::SET_META_CONTEXT, ReplyType::Ack, &[]);
                }
            }
            ClientOption::Unknown(number) => {
                put_error(out, number, ReplyType::ErrUnsup, "this server does not know the option");
            }
        }
        Step::Continue
    }

    fn start_tls(&self, out: &mut BytesMut) -> Step {
        match self.tls {
            TlsState::Offered | TlsState::Required => {
                put_reply(out, option::STARTTLS, ReplyType::Ack, &[]);
                Step::StartTls
            }
            TlsState::Active => {
                put_error(out, option::STARTTLS, ReplyType::ErrInvalid, "TLS is active already");
                Step::Continue
            }
            TlsState::Off => {
                let message = "this server has no certificate: TLS is off";
                put_error(out, option::STARTTLS, ReplyType::ErrPolicy, message);
                Step::Continue
            }
        }
    }

    fn needs_structured(&self, number: u32, out: &mut BytesMut) -> bool {
        if !self.structured {
            let message = "negotiate structured replies first";
            put_error(out, number, ReplyType::ErrInvalid, message);
        }
        self.structured
    }

    /// Answers `LIST` with some of the entries.
    pub(crate) fn list_entries(&self, entries: &[ExportEntry], out: &mut BytesMut) {
        for entry in entries {
            put_server(out, &entry.name, &entry.description);
        }
    }

    /// Ends the answer to `LIST`.
    pub(crate) fn list_done(&self, out: &mut BytesMut) {
        put_reply(out, option::LIST, ReplyType::Ack, &[]);
    }

    /// Answers a successful open. Transmission follows unless it was `INFO`.
    pub(crate) fn opened(
        &self,
        how: Opening,
        request: &InfoRequest,
        export: &ExportInfo,
        out: &mut BytesMut,
    ) {
        let flags = export.features.to_wire(self.structured);
        if how == Opening::Bare {
            put_export_name_reply(out, export.size, flags, self.client.no_zeroes);
            return;
        }
        let number = how.number();
        put_info_export(out, number, export.size, flags);
        if request.wanted.contains(&info::NAME) {
            let name = export.canonical_name.as_deref().unwrap_or(&request.name);
            put_info_text(out, number, info::NAME, name);
        }
        if let Some(description) = &export.description
            && request.wanted.contains(&info::DESCRIPTION)
        {
            put_info_text(out, number, info::DESCRIPTION, description);
        }
        // Sent unasked too: a client that did not ask may still heed it, and all are checked.
        let sizes = export.block_sizes;
        put_info_block_size(out, number, [sizes.minimum, sizes.preferred, sizes.maximum]);
        put_reply(out, number, ReplyType::Ack, &[]);
    }

    /// Answers a refused open; an `EXPORT_NAME` can only be cut off.
    pub(crate) fn refused(&self, how: Opening, error: &OpenError, out: &mut BytesMut) -> Step {
        if how == Opening::Bare {
            return Step::End("EXPORT_NAME refused");
        }
        let kind = match error.reply_type() {
            // The protocol forbids asking for TLS where it is active or not to be had.
            ReplyType::ErrTlsReqd if self.tls != TlsState::Offered => ReplyType::ErrPolicy,
            kind => kind,
        };
        put_error(out, how.number(), kind, &error.to_string());
        Step::Continue
    }

    pub(crate) fn structured(&self) -> bool {
        self.structured
    }

    /// Whether block status may be asked of the export entered by this name.
    pub(crate) fn allocation_selected(&self, name: &str) -> bool {
        self.structured && self.allocation_of.as_deref() == Some(name)
    }
}

#[cfg(test)]
mod tests;
