// Small parts that every view is made of.

import { html, useEffect, useRef, useState } from "./html.js";
import { shown, spaced } from "./words.js";

const HINTS = {
  stale_etag: "Somebody has changed it since you looked. It was loaded again; look, and try once more.",
  permission_denied: "Sign in with a token that may do it.",
  busy: "Try again in a moment.",
  exports_busy: "Try again in a moment.",
  journal_full: "The disk has no room for the journal.",
};

export function Badge({ level, children }) {
  return html`<span class="badge ${level}"><i aria-hidden="true"></i>${children}</span>`;
}

export function ProblemNote({ problem }) {
  if (!problem) return null;
  const hint = HINTS[problem.code] ?? (problem.retryAfterS ? `Try again in ${problem.retryAfterS} s.` : "");
  return html`<div class="note bad" role="alert">
    <p><strong>Refused${problem.code ? html` <code>${problem.code}</code>` : ""}.</strong> ${problem.message}</p>
    ${hint && html`<p>${hint}</p>`}
  </div>`;
}

export function Done({ children }) {
  return html`<div class="note ok" role="status">${children}</div>`;
}

export function Loading({ problem }) {
  return problem ? html`<${ProblemNote} problem=${problem} />` : html`<p class="quiet" role="status">Loading…</p>`;
}

export function Button({ kind = "", busy = false, children, ...rest }) {
  return html`<button type="button" class="button ${kind}" aria-busy=${busy} disabled=${busy || rest.disabled} ...${rest}>
    ${children}
  </button>`;
}

// A table that can be scrolled by the keyboard where it is wider than the screen.
export function Table({ label, columns, children }) {
  return html`<div class="scroll" role="region" aria-label=${label} tabindex="0">
    <table>
      <thead><tr>${columns.map((column) => html`<th scope="col" class=${column.kind ?? ""}>${column.name ?? column}</th>`)}</tr></thead>
      <tbody>${children}</tbody>
    </table>
  </div>`;
}

export function Section({ title, action, children }) {
  return html`<section class="panel">
    <header><h2>${title}</h2>${action}</header>
    ${children}
  </section>`;
}

// Asks before `act` is called. `act` may be refused: then the dialog stays and says so.
export function Ask({ title, act, word, kind = "danger", onClose, children }) {
  const dialog = useRef(null);
  const [state, setState] = useState({ busy: false, problem: null });
  useEffect(() => dialog.current.showModal(), []);

  async function agree() {
    setState({ busy: true, problem: null });
    try {
      await act();
      dialog.current?.close();
    } catch (problem) {
      setState({ busy: false, problem });
    }
  }

  return html`<dialog ref=${dialog} aria-labelledby="ask-title" onClose=${onClose}>
    <h2 id="ask-title">${title}</h2>
    <div class="prose">${children}</div>
    <${ProblemNote} problem=${state.problem} />
    <div class="actions">
      <${Button} onClick=${() => dialog.current.close()}>Cancel</${Button}>
      <${Button} kind=${kind} busy=${state.busy} onClick=${agree}>${word}</${Button}>
    </div>
  </dialog>`;
}

// What differs between two objects, by the path of each field.
export function differences(before, after, prefix = "") {
  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const names = new Set([...Object.keys(before ?? {}), ...Object.keys(after ?? {})]);
  return [...names].flatMap((name) => {
    const [was, is] = [before?.[name], after?.[name]];
    if (isObject(was) && isObject(is)) return differences(was, is, `${prefix}${name}.`);
    return JSON.stringify(was) === JSON.stringify(is) ? [] : [{ name: prefix + name, was, is }];
  });
}

// The answer to a dry run: what would change, and from when on.
export function Preview({ answer }) {
  const changes = differences(answer.before, answer.after).filter((change) => change.name !== "etag");
  return html`<div class="note info" role="status" data-preview>
    <p><strong>Dry run: nothing was changed.</strong>
      ${answer.effective_version !== undefined && html` It would hold from version <b>${answer.effective_version}</b>, or later.`}
    </p>
    ${changes.length === 0
      ? html`<p>Nothing would be different.</p>`
      : html`<dl class="changes">${changes.map(
          (change) => html`<div><dt>${spaced(change.name)}</dt><dd><del>${shown(change.was)}</del> → <ins>${shown(change.is)}</ins></dd></div>`,
        )}</dl>`}
  </div>`;
}

// An edit that can be tried first. `send(dryRun)` makes the request and returns what the server answered.
export function useEdit(send, { onDone, onStale } = {}) {
  const [state, setState] = useState({ busy: "", problem: null, preview: null, done: null });

  async function run(dryRun) {
    setState({ busy: dryRun ? "try" : "apply", problem: null, preview: null, done: null });
    try {
      const { found } = await send(dryRun);
      // the next edit is of what this one has made
      if (!dryRun) await onDone?.(found);
      setState({ busy: "", problem: null, preview: dryRun ? found : null, done: dryRun ? null : found });
    } catch (problem) {
      if (problem.code === "stale_etag") await onStale?.();
      setState({ busy: "", problem, preview: null, done: null });
    }
  }

  const clear = () => setState({ busy: "", problem: null, preview: null, done: null });
  return { ...state, run, clear };
}

export function EditButtons({ edit, isChanged, word = "Apply", children }) {
  return html`<div class="actions">
    ${children}
    <${Button} busy=${edit.busy === "try"} disabled=${!isChanged || Boolean(edit.busy)} onClick=${() => edit.run(true)}>Try (dry run)</${Button}>
    <${Button} kind="primary" busy=${edit.busy === "apply"} disabled=${!isChanged || Boolean(edit.busy)} onClick=${() => edit.run(false)}>${word}</${Button}>
  </div>`;
}

export function EditAnswer({ edit, what = "Changed" }) {
  return html`<div aria-live="polite">
    <${ProblemNote} problem=${edit.problem} />
    ${edit.preview && html`<${Preview} answer=${edit.preview} />`}
    ${edit.done && html`<${Done}><span data-done>${what}.${
      edit.done.effective_version === undefined ? "" : html` It holds from version <b>${edit.done.effective_version}</b>.`
    }</span></${Done}>`}
  </div>`;
}
