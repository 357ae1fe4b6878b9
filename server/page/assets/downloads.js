// Files of the server. Without a token a link does; with one, the page has to send it, and passes the bytes on to a file.

import { open, token, url } from "./api.js";
import { html, useState } from "./html.js";
import { Button, ProblemNote } from "./parts.js";
import { bytes } from "./words.js";

async function save(below, query, name, onBytes) {
  // the browser's own dialog has to come before anything is waited for
  const file = window.showSaveFilePicker ? await window.showSaveFilePicker({ suggestedName: name }) : null;
  const answer = await open(below, { query });
  const writer = file ? (await file.createWritable()).getWriter() : null;
  const parts = [];
  const reader = answer.body.getReader();
  let got = 0;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    if (writer) await writer.write(value);
    else parts.push(value);
    got += value.length;
    onBytes(got);
  }
  if (writer) {
    await writer.close();
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(parts));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export function Download({ below, query, name, label, children }) {
  const [state, setState] = useState({ got: null, problem: null });
  if (!token()) return html`<a class="button" href=${url(below, query)} download=${name} aria-label=${label}>${children}</a>`;
  async function fetchIt() {
    setState({ got: 0, problem: null });
    try {
      await save(below, query, name, (got) => setState({ got, problem: null }));
      setState({ got: null, problem: null });
    } catch (problem) {
      setState({ got: null, problem: problem.name === "AbortError" ? null : problem });
    }
  }
  return html`<${Button} busy=${state.got !== null} aria-label=${label} onClick=${fetchIt}>${state.got === null ? children : bytes(state.got)}</${Button}>
    <${ProblemNote} problem=${state.problem} />`;
}
