import numpy as np, nibabel as nib
def test_x(tiny_bundle, phantom, helpers, tmp_path):
    from jrs import Pipeline
    with Pipeline.open(tiny_bundle, "ort-cpu", threads=1) as p:
        a=p.infer(phantom.folder, atlas=phantom.atlas); print("fold",a.folding_percent, a.jacobian.min(), np.abs(a.transform.displacement.vectors_mm).max(), a.transform.displacement.vectors_mm.std())
        def go(codes,**k):
            f=tmp_path/codes
            for m in ("t1","t1ce","t2","flair"):
                im=phantom.image(m); d,af=helpers.stored_as(np.asarray(im.dataobj),im.affine,codes); helpers.write_image(f/f"case7_{m}.nii.gz",np.ascontiguousarray(d),af)
            return p.infer(f,atlas=phantom.atlas,**k)
        for kw in (dict(affine="off"),{}):
            w=p.infer(phantom.folder, atlas=phantom.atlas,**kw)
            for c in ("RAS","PSR","SLP","IAL"):
                g=go(c,**kw)
                b,_=helpers.stored_as(g.labels_native,np.asarray(g.native.affine),"LPS")
                print(kw,c,"field",np.abs(g.field.vectors_mm-w.field.vectors_mm).max(),"labels",(b!=w.labels_native).sum(),b.size,"aff",np.abs(g.transform.affine-w.transform.affine).max())
    assert 0
