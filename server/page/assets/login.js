// The server has tokens: the page asks for one. It stays in this tab's session storage, and in no address.

import { html, useRef } from "./html.js";
import { ProblemNote } from "./parts.js";

export function Login({ problem, onToken }) {
  const field = useRef(null);
  function submit(event) {
    event.preventDefault();
    const text = field.current.value.trim();
    if (text) onToken(text);
  }
  return html`<form class="panel login" onSubmit=${submit}>
    <h1>Sign in</h1>
    <p>This server asks for a token: a viewer's to look, an operator's to steer.</p>
    <label for="token">Token</label>
    <input id="token" ref=${field} type="password" autocomplete="current-password" autofocus required spellcheck="false" />
    <${ProblemNote} problem=${problem} />
    <div class="actions"><button class="button primary" type="submit">Sign in</button></div>
    <p class="quiet">It is kept until this tab is closed. <code>pushstep-server --make-token viewer --name you</code> makes one.</p>
  </form>`;
}
