from fastai.vision.all import *
from .site import *
from .metadata import *
class IntToFloat(DisplayedTransform):
    order=10
    def encodes(self, x:TensorSite): return x.float()/255 if x.dtype==torch.uint8 else (x.float()/65535 if x.dtype==torch.uint16 else x)
class FoldSites(DisplayedTransform):
    order=11
    def encodes(self, x:TensorWell): return TensorSite(x.as_subclass(torch.Tensor).flatten(0,1))
class ShuffleSites(DisplayedTransform):
    order=9; split_idx=0
    def encodes(self, x:TensorWell): return TensorWell(x.as_subclass(torch.Tensor)[:, torch.randperm(x.shape[1])])
class UnfoldSites(DisplayedTransform):
    order=200
    def __init__(self,S=2): self.S=S
    def encodes(self, x:TensorSite): return TensorWell(x.as_subclass(torch.Tensor).unflatten(0,(-1,self.S)))
class ResizeBatch(DisplayedTransform):
    order=12
    def __init__(self,size): self.size=size
    def encodes(self, x:TensorSite): return TensorSite(F.interpolate(x.as_subclass(torch.Tensor),size=(self.size,self.size),mode='bilinear',antialias=True))
class CLAHE(ItemTransform): pass
def site_augs(): return [Dihedral()]
class OwnNorm(DisplayedTransform):
    order=100
    def encodes(self, x:TensorSite):
        m=x.mean((2,3),keepdim=True); s=x.std((2,3),keepdim=True); return (x-m)/(s+1e-5)
def normalizer(how, stats=None): return OwnNorm()
def dihedral(x,k):
    if k>=4: x=x.transpose(-1,-2)
    return torch.rot90(x,k%4,(-2,-1))
